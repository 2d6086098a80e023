"""One global batch index says where a run is, whatever the number of processes."""

import dataclasses
import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swaa_jax.data import BatchSource, DataConfig, PlanMismatchError, load_data
from swaa_jax.data.packing import make_plan
from tests.support import byte_tokenizer

ROWS = [{"prompt": f"q{n}", "response": "a" * (1 + 7 * n % 40)} for n in range(40)]
CONFIG = DataConfig(seq_len=160, batch_size=4, num_epochs=2, num_threads=0)


@pytest.fixture(scope="module")
def tok():
    return byte_tokenizer.build()


@pytest.fixture(scope="module")
def data(tok):
    return load_data(CONFIG, tok, records=ROWS)


def on_processes(data, count):
    """The sources of that many processes, and whole batches put together from them."""
    return [
        BatchSource(data.samples, data.plan, data.config, process_index=p, process_count=count)
        for p in range(count)
    ]


def numbers(batches):
    """Numbers of the samples in batches of several processes, in order."""
    return [
        int(i)
        for batch in batches
        for row in batch.sample_ids
        for i in dict.fromkeys(row)
        if i >= 0
    ]


def test_every_sample_once_an_epoch(data):
    batches = list(data)
    half = data.plan.num_batches
    assert len(batches) == len(data) == 2 * half
    for epoch in (batches[:half], batches[half:]):
        assert sorted(numbers(epoch)) == list(range(40))
    assert numbers(batches[:half]) != numbers(batches[half:])
    again = list(data)
    for one, other in zip(batches, again, strict=True):
        for field in dataclasses.fields(one):
            np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


@given(
    st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.integers(0, 9)), min_size=1, max_size=4),
)
@settings(max_examples=20)
def test_killed_and_resumed_on_other_processes(data, runs):
    """(processes, batches until it is killed) of each run; the last one goes on to the end."""
    state, seen = None, []
    for count, until in [*runs, (2, len(data))]:
        iterators = [iter(source) for source in on_processes(data, count)]
        if state is not None:
            for iterator in iterators:
                iterator.set_state(json.loads(state))
        for _ in range(until):
            parts = [next(iterator, None) for iterator in iterators]
            if parts[0] is None:
                assert parts == [None] * count
                break
            seen += numbers(parts)
        states = {json.dumps(iterator.get_state()) for iterator in iterators}
        (state,) = states  # one for all processes
    assert seen == numbers(data)


def test_processes_share_a_batch_in_order(data):
    for count in (2, 4):
        sources = on_processes(data, count)
        for index in (0, 3):
            whole = data[index]
            parts = [source[index] for source in sources]
            for field in dataclasses.fields(whole):
                together = np.concatenate([getattr(part, field.name) for part in parts])
                np.testing.assert_array_equal(together, getattr(whole, field.name))


def test_batches_made_ahead_and_not_taken_do_not_count(tok):
    data = load_data(dataclasses.replace(CONFIG, num_threads=3), tok, records=ROWS)
    iterator = data.iterator(start=2)
    taken = [next(iterator) for _ in range(3)]
    assert iterator.get_state()["next_batch"] == 5
    assert iterator.epoch == 5 / data.plan.num_batches
    iterator.set_state(data.plan.state(2))
    assert numbers(taken) == numbers([next(iterator) for _ in range(3)])
    iterator.close()
    assert next(iterator).tokens.shape == (4, 160)  # goes on where it was
    assert list(data.iterator(start=len(data))) == []


def test_another_plan_is_refused(tok, data):
    iterator = iter(data)
    next(iterator)
    state = iterator.get_state()
    for change, message in (
        ({"seed": 5}, "seed was 0 and is 5"),
        ({"batch_size": 2}, "batch_size was 4 and is 2"),
    ):
        other = load_data(dataclasses.replace(CONFIG, **change), tok, records=ROWS)
        with pytest.raises(PlanMismatchError, match=message):
            iter(other).set_state(state)
    other = load_data(CONFIG, tok, records=ROWS[:-1])
    with pytest.raises(PlanMismatchError, match=r"num_samples was 40 and is 39.*data was "):
        iter(other).set_state(state)
    reordered = load_data(CONFIG, tok, records=ROWS[::-1])
    with pytest.raises(PlanMismatchError, match="data was"):
        iter(reordered).set_state(state)
    # More epochs are no other plan: a run may be prolonged.
    longer = load_data(dataclasses.replace(CONFIG, num_epochs=5), tok, records=ROWS)
    iter(longer).set_state(state)
    with pytest.raises(ValueError, match="data state: expected version, next_batch"):
        iterator.set_state({"step": 3})
    with pytest.raises(ValueError, match="expected version 1, got 2"):
        iterator.set_state({**state, "version": 2})
    assert iterator.get_state() == state


def test_processes_must_divide_the_batch(data):
    with pytest.raises(ValueError, match="expected a multiple of the 3 processes"):
        on_processes(data, 3)
    with pytest.raises(ValueError, match="process_index: expected 0 to 1, got 2"):
        BatchSource(data.samples, data.plan, CONFIG, process_index=2, process_count=2)


def test_an_endless_run(tok):
    data = load_data(dataclasses.replace(CONFIG, num_epochs=None), tok, records=ROWS)
    iterator = data.iterator(start=10_000)
    assert next(iterator).tokens.shape == (4, 160)
    assert iterator.get_state()["next_batch"] == 10_001


def test_the_plan_is_cheap_at_the_papers_size():
    lengths = np.random.default_rng(0).integers(200, 34_000, 16_000)
    plan = make_plan(lengths, "", DataConfig(seq_len=34_000, batch_size=8))
    assert plan.padding_share < 0.05


def test_worker_processes_give_the_same(tmp_path):
    """In a program of its own: from a cache of files, two workers, resumed in the middle."""
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)))
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import dataclasses
            import numpy as np
            from swaa_jax.data import DataConfig, DataError, load_data
            from tests.support import byte_tokenizer

            if __name__ == "__main__":
                config = DataConfig(seq_len=160, batch_size=4, files={str(file)!r}, num_threads=0)
                here = load_data(config, byte_tokenizer.build())
                config = dataclasses.replace(config, num_workers=2)
                there = load_data(config, byte_tokenizer.build())
                iterator = there.iterator(start=1)
                for index, batch in zip(range(1, 4), iterator):
                    np.testing.assert_array_equal(batch.tokens, here[index].tokens)
                    assert iterator.next_batch == index + 1
                iterator.close()

                open({str(file)!r}, "a").write('\\n{{"prompt": "q"}}')
                config = dataclasses.replace(config, num_workers=1)
                try:
                    load_data(config, byte_tokenizer.build())
                except DataError as error:  # as it is, from the worker
                    assert "record 40 (line 41): expected an answer" in str(error), error
                    print("the same")
            """
        )
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "the same\n", done.stderr


def test_rooms_are_imported_when_they_are_needed():
    """Importing the library or the data room brings neither Grain nor pyarrow."""
    code = "import sys, swaa_jax.data; print({'grain', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
