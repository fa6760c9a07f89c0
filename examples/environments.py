"""Something to talk with for docs/environments.md: a game, and a tool."""

import ast
import operator
import random

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


class GuessingGame:
    """The policy finds a number from 1 to 20 in at most six guesses: 1 point, less 0.1 for each but the first."""

    def reset(self, row):
        self.secret, self.guesses = random.Random(row["environment_seed"]).randint(1, 20), 0

    def step(self, answer):
        self.guesses += 1
        words = answer.split()
        guess = int(words[-1]) if words and words[-1].isdecimal() and len(words[-1]) < 9 else None
        if guess == self.secret:
            return None, 1.1 - 0.1 * self.guesses, True
        if self.guesses == 6:
            return None, 0.0, True
        if guess is None:
            return "Answer with a number.", 0.0, False
        return "Higher." if guess < self.secret else "Lower.", 0.0, False


def calculator(expression: str) -> str:
    """Computes an expression of numbers, + - * / and brackets.

    Args:
        expression: The expression, such as 3 * (2 + 5).
    """
    return f"{value(ast.parse(expression[:200], mode='eval').body):g}"


def value(node: ast.expr) -> float:
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](value(node.left), value(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -value(node.operand)
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return float(node.value)
    raise ValueError("only numbers, + - * / and brackets can be computed")
