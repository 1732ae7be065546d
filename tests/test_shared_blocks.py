"""Scripts must run when copied alone, so some code stands in several files. A block between
`# --- shared block: NAME ---` and `# --- end shared block ---` is byte-identical wherever it stands; its
first line names the file it is copied from.

python tests/test_shared_blocks.py --fix   copies every block from its origin into the other scripts
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = r"# --- shared block: (\w+) ---\n", r"# --- end shared block ---\n"
BLOCK = re.compile(rf"{BEGIN}(# Origin: (\w+\.py)\..*?){END}", re.DOTALL)


def read_blocks(root: Path = ROOT) -> dict[str, dict[str, str]]:
    """{block: {file: text}} of all scripts at the top level."""
    blocks = {}
    for path in sorted(root.glob("*.py")):
        text = path.read_text()
        found = list(BLOCK.finditer(text))
        assert text.count("# --- shared block:") == text.count("# --- end shared block ---") == len(found), (
            f"{path.name}: a shared block lacks its end or its '# Origin: FILE.' line"
        )
        for match in found:
            blocks.setdefault(match[1], {})[path.name] = match[0]
    return blocks


def find_differences(root: Path = ROOT, fix=False) -> list[str]:
    """With `fix` they are mended, too."""
    problems = []
    for name, copies in read_blocks(root).items():
        origin = BLOCK.match(next(iter(copies.values())))[3]
        if origin not in copies:
            problems.append(f"{name}: its origin {origin} does not have it")
        for file, text in copies.items():
            if text != copies.get(origin, text):
                problems.append(f"{name}: {file} differs from {origin}")
                if fix:
                    path = root / file
                    path.write_text(path.read_text().replace(text, copies[origin]))
    return problems


def test_shared_blocks_are_identical():
    assert find_differences() == []


def test_every_block_is_shared():
    assert [name for name, copies in read_blocks().items() if len(copies) < 2] == []


def test_the_checker_names_both_places_and_repairs(tmp_path):
    block = "# --- shared block: b ---\n# Origin: one.py. Text.\nx = 1\n# --- end shared block ---\n"
    (tmp_path / "one.py").write_text(block)
    (tmp_path / "two.py").write_text("y = 0\n" + block.replace("x = 1", "x = 2"))
    for fix in (False, True):
        assert find_differences(tmp_path, fix) == ["b: two.py differs from one.py"]
    assert find_differences(tmp_path) == []
    assert (tmp_path / "two.py").read_text() == "y = 0\n" + block


if __name__ == "__main__":
    print(*find_differences(fix="--fix" in sys.argv), sep="\n")
