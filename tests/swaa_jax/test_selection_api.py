"""`swaa.select_layers`: models, tokenizers, data and policies in any form; what is shown."""

import inspect
import json
import xml.etree.ElementTree as ET

import datasets
import pandas as pd
import pytest

import swaa_jax as swaa
from swaa_jax.selection import read_calibration, select_from_samples, select_layers
from tests.support import byte_tokenizer
from tests.support.random_models import random_model
from tests.support.retrieval_model import RETRIEVING, retrieval_model, retrieval_samples
from tests.support.selections import selected_heads

ROWS = [
    {"prompt": f"The code of door {n} is {n * n}. What is the code of door {n}?", "answer": f"{n}"}
    for n in range(3)
]


UNCHECKED = inspect.unwrap(select_layers)  # by the tests' type checker


@pytest.fixture(scope="module")
def case():
    return retrieval_model("halves"), retrieval_samples("halves", count=2)


@pytest.fixture(scope="module")
def found(case):
    return swaa.select_layers(
        case[0], None, case[1], policy="window=16,sinks=1,decode=full", share="1/3", rows_at_once=3
    )


def test_it_is_the_same_as_from_samples(case, found):
    model, samples = case
    policy = swaa.AttentionPolicy(window=16, num_sink_tokens=1, decode="full")
    other = select_from_samples(
        model, samples, method="add_one", num_full_layers=2, policy=policy, rows_at_once=3
    )
    assert found.chosen == other.chosen == RETRIEVING
    assert (found.policy, found.scores) == (other.policy, other.scores)
    assert model.with_policy(found.policy).policy == found.policy


def test_data_of_every_form_gives_the_same_samples(tmp_path):
    tok = byte_tokenizer.build()
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    expected = [sample.tokens.tolist() for sample in read_calibration(path, tok)]
    forms = [
        ROWS,
        tuple(ROWS),
        datasets.Dataset.from_list(ROWS),
        pd.DataFrame(ROWS),
        [str(path)],
        str(path),
    ]
    for form in forms:
        given = read_calibration(form, tok)
        assert [sample.tokens.tolist() for sample in given] == expected
    assert len(read_calibration(ROWS, tok, limit=2)) == 2


def test_a_selection_shows_itself(found, tmp_path):
    assert len(repr(found)) < 300 and "2 of 6 layers full (1, 2)" in repr(found)
    lines = found.table().records()
    assert [line["layer"] for line in lines if line["full"]] == list(RETRIEVING)
    assert [line["score"] for line in lines] == list(found.scores)
    assert found.to_pandas()["score"].tolist() == list(found.scores)
    page = ET.fromstring(found._repr_html_())
    (svg,) = page.iter("{http://www.w3.org/2000/svg}svg")
    bars = [one for one in svg if len(one)]  # those with a title
    colors = [one.get("fill") for one in bars]
    assert len(bars) == 6
    assert {at for at, color in enumerate(colors) if color == colors[1]} == set(RETRIEVING)
    assert "1, 2" in svg.get("aria-label", "")
    assert found.plot(tmp_path / "scores.png")._repr_png_()[:4] == b"\x89PNG"
    assert (tmp_path / "scores.png").stat().st_size > 5000
    paths = found.save(tmp_path / "kept")
    assert swaa.load_policy(paths["policy.yaml"]) == found.policy


def test_selected_heads_show_themselves():
    found = selected_heads()
    assert "3 KV heads of 4 layers full (1:0, 3:0, 3:1)" in repr(found)
    assert [line["full_heads"] for line in found.table().records()] == ["", "0", "", "0, 1"]
    (svg,) = ET.fromstring(found._repr_html_()).iter("{http://www.w3.org/2000/svg}svg")
    titles = [one[0].text or "" for one in svg if len(one)]
    assert sum(": full" in title for title in titles) == 3 and len(titles) == 8


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "tok", "tok": "model"}, "tok: expected a tokenizer .* got a CausalLM"),
        ({"model": 3}, "model: expected a model from load_model, .* got 3"),
        ({"tok": ROWS, "data": None}, "data: expected data behind the tokenizer"),
        ({"data": None}, "data: expected prompts with answers .* got None"),
        ({"data": {"train": ROWS}}, "data: expected a list of records"),
        ({"data": [1]}, "expected a JSON object, got 1"),
        ({"data": [{"prompt": "x"}]}, "expected an answer, as response, answer or"),
        ({"policy": "full"}, "policy: expected one with a window"),
        ({"policy": "instruct-no-train"}, "policy: expected no full layers"),
        ({"share": None}, "share: expected it or num_full_layers, got neither"),
        ({"num_full_layers": 1}, "share: expected it or num_full_layers, got both"),
        ({"share": 2}, "share: expected a part of the layers, above 0 and below 1"),
        ({"share": "1/9"}, "share: expected a part of the 2 layers"),
        ({"output_dir": "x"}, r"got 'output_dir' \(did you mean 'directory'\?\)"),
        ({"directory": __file__}, r"directory: expected a directory that can .* is a file"),
        ({"share": None, "num_full_layers": "1"}, "num_full_layers: expected an integer"),
        ({"share": None, "num_full_layers": 2}, "num_full_layers: expected 1 to 1 of"),
        ({"method": "addone"}, r"did you mean 'add_one'"),
        ({"offset": 1}, "offset: expected an option of add_one .* got one of periodic"),
        ({"shre": 0.5}, r"got 'shre' \(did you mean 'share'\?\)"),
        ({"method": "gates", "stepz": 2}, r"got 'stepz' \(did you mean 'steps'\?\)"),
        ({"enable_thinking": "no"}, "enable_thinking: expected true or false"),
        ({"thinking": True}, r"got 'thinking' \(did you mean 'enable_thinking'\?\)"),
        ({"limit": 0}, "limit: expected an integer of at least 1"),
        ({"max_length": "9"}, "max_length: expected an integer"),
        ({"rows_at_once": "a"}, "rows_at_once: expected an integer"),
        ({"directory": 3}, "directory: expected"),
        ({"data_config": {"colums": {}}}, "did you mean 'columns'"),
        ({"data_config": "x"}, "data_config: expected a mapping"),
    ],
)
def test_mistakes_are_told_in_a_line(changes, message):
    model, tok = random_model(num_hidden_layers=2), byte_tokenizer.build()
    given = {"model": model, "tok": tok, "data": ROWS, "policy": "window=8", "share": 0.5}
    things = {"model": model, "tok": tok}
    given |= {
        name: things.get(value, value) if isinstance(value, str) else value
        for name, value in changes.items()
    }
    with pytest.raises(ValueError, match=message) as error:
        UNCHECKED(**given)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 700
