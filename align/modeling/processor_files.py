"""The files of what turns images, video and sound into a model's inputs, which lie beside its tokenizer."""

import logging
import shutil
from pathlib import Path

from align.data.hub import offline_if_unreachable
from align.errors import one_line
from align.modeling.adapters import adapter_base, is_adapter
from align.modeling.mistral_tokenizer import QUIET
from align.modeling.text_part import unreached
from align.modeling.types import Model

logger = logging.getLogger(__name__)

FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def keep_processor(core: Model, folder: str | Path) -> None:
    """Copy them from where the model was loaded into a folder that it was saved in: without them transformers'
    `AutoProcessor` takes no images, and vLLM does not start. Nothing to do for a model of text alone."""
    from transformers.utils import cached_file

    source = core.config.name_or_path
    if not source or not unreached(core):
        return
    try:
        while is_adapter(source):
            source = str(adapter_base(source))
        with offline_if_unreachable(source):
            found = [cached_file(source, name, **QUIET) for name in FILES]
    except Exception as error:  # a source that is no more there: the weights are what must not be lost
        logger.warning("the files of images (%s) are not copied from %s: %s", ", ".join(FILES), source, one_line(error))
        return
    for path in map(Path, filter(None, found)):
        target = Path(folder) / path.name
        if not (target.exists() and path.samefile(target)):
            shutil.copyfile(path, target)
