"""What README and docs tell readers to type runs; `tests/support/snippets.py` says how."""

import dataclasses
import json

import pyarrow
import pyarrow.parquet
import pytest

from swaa_jax.checkpoint import SHIPPED
from tests.support.snippets import PAGES, ROOT, Reader, snippets

BLOCKS = {page: list(snippets((ROOT / page).read_text())) for page in PAGES}
READ = [page for page, blocks in BLOCKS.items() if any(each.language for each in blocks)]

UNTRIED = (
    *(
        f"docs/{name}.md"
        for name in (
            "benchmarking",
            "evaluation",
            "python-api",
            "select-layers",
            "tpu",
            "training",
        )
    ),
)  # read, not run, so far


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """The files that pages take for granted: a model, questions with answers, training data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").symlink_to(SHIPPED["tiny-retriever"])
    asked = [
        {
            "prompt": f"One of the special magic numbers for calm-lake is: {number}. What is it?",
            "answer": str(number),
            "response": str(number),
        }
        for number in (4815162, 7342915)
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(each) + "\n" for each in asked))
    (tmp_path / "data").mkdir()
    for name in ("train.parquet", "questions.parquet", "data/train.parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(asked), tmp_path / name)


@pytest.mark.parametrize("page", READ)
@pytest.mark.usefixtures("desk")
def test_snippets_run(page):
    reader = Reader(page)
    for snippet in BLOCKS[page]:
        if page in UNTRIED:
            snippet = dataclasses.replace(snippet, skip=(*snippet.skip, "untried"))
        reader.run(snippet)
