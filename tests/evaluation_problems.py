"""Small problems of our own in the shape of each benchmark's data, with right and wrong answers."""

HUMANEVAL = [
    {
        "task_id": "Own/0",
        "prompt": 'from typing import List\n\ndef total(numbers: List[int]) -> int:\n    """ Adds them up.\n    """\n',
        "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n\ncheck(total)",
        "right": "    return sum(numbers)\n\ndef more():\n    pass\n",
        "wrong": "    return 4\n",
    },
    {
        "task_id": "Own/1",
        "prompt": 'def double(x):\n    """ Twice x. """\n',
        "test": "def check(candidate):\n    assert candidate(4) == 8\n\ncheck(double)",
        "right": "    return x * 2\n",
        "wrong": "    import os\n    os._exit(0)\n",
    },
]
HUMANEVAL_CPP = {
    "task_id": "Own_cpp",
    "language": "cpp",
    "prompt": "#include<assert.h>\n// Twice x.\nlong twice(long x) {\n",
    "stop_tokens": ["\n}"],
    "test": "}\nint main() {\n    assert(twice(4) == 8);\n}\n",
    "right": "    return 2 * x;\n}\nint other() { return 1; }",
    "wrong": "    return x;\n}",
    "broken": "    return nothing;\n}",
}
SHOTS = [
    {"task_id": number, "text": f"Write example {number}.", "code": f"def e{number}(): return {number}",
     "test_list": [f"assert e{number}() == {number}"]} for number in (2, 3, 4)
]  # fmt: skip
MBPP = [
    {
        "task_id": 11,
        "text": "Write a function that finds the height of a tree.",
        "code": "class Leaf:\n    kids = ()\n"
        "def height(leaf): return 1 + max(map(height, leaf.kids), default=0)",
        "test_setup_code": "root = Leaf()\nroot.kids = [Leaf()]",
        "test_list": ["assert height(root) == 2"],
        "wrong": "class Leaf: kids = ()\ndef height(leaf): return 1",
    }
]  # fmt: skip
LEETCODE = [
    {
        "task_id": "own-contest-1",
        "prompt": '"""\nAdd two numbers.\n"""\nclass Solution:\n    def add(self, a: int, b: int) -> int:\n        ',
        "prompt_sft": "Add two numbers.\n```python\nclass Solution:\n    def add(self, a, b):\n        \n```",
        "test": "\nmy_solution = Solution()\nassert my_solution.add(a=1, b=2) == 3\n",
        "meta": {"difficulty": "Easy"},
        "right": "return a + b\n\nprint('x')",
        "wrong": "return a",
        "chat": "Here it is:\n```python\nclass Solution:\n    @cache\n    def add(self, a, b):\n        return a + b\n"
        "```\nDone.",
    }
]
DS1000 = [
    {
        "prompt": "Problem:\nDouble the array.\n<code>\na = np.arange(3)\n</code>\nBEGIN SOLUTION\n<code>\n",
        "code_context": "import numpy as np\n\n"
        "def test_execution(solution):\n    space = {'np': np, 'a': np.arange(3)}\n"
        "    exec(solution, space)\n    assert (space['result'] == np.array([0, 2, 4])).all()\n",
        "metadata": {"problem_id": 7, "library": "Numpy"},
        "right": "result = a * 2\n</code>\nmore",
        "wrong": "result = a",
    }
]  # fmt: skip
PAL = [
    {
        "question": "Ann has 3 apples and eats one. How many are left?", "answer": "3 - 1 = 2\n#### 2", "idx": 0,
        "right": "```python\ndef solution():\n    return 3 - 1\n```\n\nQuestion: more",
        "wrong": "```python\ndef solution():\n    return 3\n```",
    },
    {
        "problem": "What is half?", "solution": "It is $\\boxed{\\frac{1}{2}}$.", "level": "1", "type": "Algebra",
        "idx": 1,
        "right": "```python\nimport sympy\ndef solution():\n    return sympy.Rational(1, 2)\n```",
        "wrong": "```python\ndef solution():\n    return '2/1'\n```",
    },
    {
        "Body": "Bo has 50 of 200.", "Question": "How many percent?", "Answer": 25.0, "idx": 2,
        "right": "```python\ndef solution():\n    return 0.25\n```",
        "wrong": "```python\ndef solution():\n    return math.floor(0.25)\n```",  # math is not imported
    },
]  # fmt: skip
INFILL = [
    {
        "prompt": "def f(x):\n", "suffix": "\n    return y\n", "canonical_solution": "    y = x + 1", "language": "py",
        "right": "    y = x + 1  \nand more", "wrong": "    y = x + 2",
    }
]  # fmt: skip
CROSSCODE = [
    {
        "prompt": "import shop\nitem = shop.", "groundtruth": "Item(\n  1)", "metadata": {"task_id": "a/1"},
        "crossfile_context": {"list": [{"filename": "shop.py", "retrieved_chunk": "class Item:\n\n    pass"}]},
        "right": "Item(  # one\n1)\nprint(item)", "wrong": "Thing(1)",
    }
]  # fmt: skip
