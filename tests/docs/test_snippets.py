"""What README and docs tell readers to type runs; `tests/support/snippets.py` says how."""

import json
import shutil

import pyarrow
import pyarrow.parquet
import pytest
from etils import epath

import swaa_jax as swaa
from swaa_jax.checkpoint import SHIPPED
from swaa_jax.models import model_from_config
from tests.support.random_models import HF_CONFIG
from tests.support.snippets import PAGES, ROOT, Reader, snippets

BLOCKS = {page: list(snippets((ROOT / page).read_text())) for page in PAGES}
READ = [page for page, blocks in BLOCKS.items() if any(each.language for each in blocks)]

# Tried on the shipped model, as a reader does: what they say needs answers that are right.
AS_SHIPPED = ("README.md", "docs/data.md")

# Elsewhere its architecture and tokenizer, with a hundredth of its parameters, drawn at random.
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("num_key_value_heads", "head_dim", "initializer_range")
SMALL = {name: HF_CONFIG[name] for name in SIZES}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The directory of such a model."""
    shipped = SHIPPED["tiny-retriever"]
    config = {**json.loads((shipped / "config.json").read_text()), **SMALL}
    path = epath.Path(tmp_path_factory.mktemp("small")) / "my-model"
    tokenizer = swaa.load_tokenizer("tiny-retriever")
    swaa.save_model(model_from_config(config, dtype="float32"), path, tokenizer=tokenizer)
    return path


@pytest.fixture
def desk(tmp_path, monkeypatch, small):
    """The files that pages take for granted: a model, questions with answers, training data."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small, tmp_path / "my-model")
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
def test_snippets_run(page, small, monkeypatch):
    if page not in AS_SHIPPED:
        monkeypatch.setitem(SHIPPED, "tiny-retriever", small)
    reader = Reader(page)
    for snippet in BLOCKS[page]:
        reader.run(snippet)
