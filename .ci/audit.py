"""Known vulnerabilities of the pinned packages: `make audit`.

    .venv-audit/bin/python .ci/audit.py constraints.txt

Exit status 0: all packages were looked up and none has a known vulnerability; 1: some have one; 3: of some packages or
of all the data could not be had, and none of the others has one. pip-audit itself ends with 0 then.
"""

import json
import subprocess
import sys

FOUND, NO_DATA = 1, 3


def verdict(dependencies: list[dict]) -> tuple[int, str]:
    """(exit status, what to print) of the `dependencies` of pip-audit's JSON."""
    skipped = [one for one in dependencies if "skip_reason" in one]
    vulnerable = [one for one in dependencies if one.get("vulns")]
    lines = []
    for one in vulnerable:
        for known in one["vulns"]:
            fixed = ", ".join(known["fix_versions"]) or "no version"
            lines.append(f"{one['name']} {one['version']}: {known['id']}, fixed in {fixed}")
    looked_up = len(dependencies) - len(skipped)
    lines.append(f"{looked_up} of {len(dependencies)} packages looked up, {len(vulnerable)} with known vulnerabilities")
    if skipped or not dependencies:
        names = ", ".join(one["name"] for one in skipped[:5]) + (" ..." if len(skipped) > 5 else "")
        first = skipped[0]["skip_reason"] if skipped else "no package was named"
        lines.append(f"NOT AUDITED: {names or 'anything'}: {first}")
    return FOUND if vulnerable else NO_DATA if skipped or not dependencies else 0, "\n".join(lines)


def main(files: list[str]) -> int:
    named = [word for file in files for word in ("-r", file)]
    options = ["--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off"]
    done = subprocess.run([sys.executable, "-m", "pip_audit", *named, *options], capture_output=True, text=True)
    try:
        dependencies = json.loads(done.stdout)["dependencies"]
    except ValueError:  # it ends in a traceback where the index cannot be reached at all
        said = done.stderr.strip().splitlines() or ["no word"]
        print(f"NOT AUDITED: pip-audit ended with {done.returncode}: {said[-1]}")
        return NO_DATA
    status, text = verdict(dependencies)
    print(text)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
