"""The tag of an image depends on the Dockerfile's inputs and on nothing else."""

from pathlib import Path

import pytest
from scripts import images


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in images.INPUTS:
        if name in images.SOURCES:
            (tmp_path / name / "package").mkdir(parents=True)
            (tmp_path / name / "package" / "module.py").write_text("x = 1\n")
        else:
            (tmp_path / name).write_text(name)
    return tmp_path


def key(root: Path, target: str = "operator", base: str = "base:1") -> str:
    return images.content_key(root, target, base)


def test_tag_depends_on_the_content(tree: Path):
    before = key(tree)
    assert key(tree, target="engine") != before
    assert key(tree, base="base:2") != before
    (tree / "engine" / "package" / "module.py").write_text("x = 2\n")
    assert key(tree) != before


def test_tag_ignores_files_outside_the_build(tree: Path):
    before = key(tree)
    (tree / "engine" / "package" / "__pycache__").mkdir()
    (tree / "engine" / "package" / "__pycache__" / "module.pyc").write_text("")
    (tree / "tests").mkdir()
    (tree / "tests" / "test_x.py").write_text("")
    assert key(tree) == before


def test_moved_file_changes_the_tag(tree: Path):
    before = key(tree)
    (tree / "engine" / "package" / "module.py").rename(tree / "engine" / "package" / "other.py")
    assert key(tree) != before


def test_unknown_target_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        images.main(["engin"])
    assert ended.value.code == 2
    assert "invalid choice: 'engin'" in capsys.readouterr().err
