"""What requests may say, where they are refused, and the table that follows them through the batch."""

import json

import pytest
import torch
from conftest import REFERENCES
from vllm import EngineArgs, SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from modeling_pcm_ensemble.vllm.requests import (
    PROCESSORS,
    PreferenceProcessor,
    RequestTable,
    WishReader,
    front_end_processor,
)

PLACES = 8


def engine_config(name: str = "probabilities", places: int = PLACES, **additional) -> VllmConfig:
    """An engine's configuration, which its front end and its runner read."""
    arguments = {"max_model_len": 256, "max_num_seqs": places, "dtype": "float32", "enforce_eager": True}
    return EngineArgs(str(REFERENCES / name), additional_config=additional, **arguments).create_engine_config()


@pytest.fixture(scope="module")
def two_slots() -> type:
    """The check of an engine with two slots."""
    return getattr(PROCESSORS, front_end_processor(engine_config(expert_slots=2)).rpartition(".")[2])


def params(**extra_args) -> SamplingParams:
    return SamplingParams(extra_args=extra_args or None)


@pytest.fixture
def processor() -> PreferenceProcessor:
    return PreferenceProcessor(engine_config(), torch.device("cpu"), False)


def stand(processor: PreferenceProcessor, number: int) -> list[tuple[list[float], list[int], int]]:
    batch = processor.table.batch(number)
    return list(zip(batch.weights.tolist(), batch.slots.tolist(), batch.offsets[:, 0].tolist()))


def test_requests_that_join_leave_and_move_keep_what_they_asked_for(processor):
    said = {"a": {"preference": "kind"}, "b": {"preference": ["brief", "rude"]}, "c": {"preference_ids": [40, 41]}}
    added = [(place, params(**extra_args), [1], []) for place, extra_args in enumerate(said.values())]
    processor.update_state(BatchUpdate(3, removed=[], added=added, moved=[]))
    a, b, c = stand(processor, 3)
    assert a == ([0, 1, 0, 0], [1, -1, -1, -1], len("Be kind.\n"))
    assert b == ([1, 0, 0, 1], [0, 3, -1, -1], len("Be brief.\nBe rude.\n"))
    assert c == ([1, 1, 1, 1], [0, 1, 2, 3], 2)

    # The first goes, the last takes its place, two change places, and one more comes.
    processor.update_state(BatchUpdate(2, [0], [], [(2, 0, MoveDirectionality.UNIDIRECTIONAL)]))
    assert stand(processor, 2) == [c, b]
    processor.update_state(BatchUpdate(2, [], [], [(0, 1, MoveDirectionality.SWAP)]))
    assert stand(processor, 2) == [b, c]
    processor.update_state(BatchUpdate(3, [], [(2, params(preference="kind"), [1], [])], []))
    assert stand(processor, 3) == [b, c, a]
    assert processor.table.batch(3).descriptions[1][0].tokens == (40, 41)

    processor.update_state(None)
    assert stand(processor, 3) == [b, c, a]
    assert processor.table.batch([2, 0]).weights.tolist() == [a[0], b[0]]


def test_the_model_and_its_runner_have_one_table():
    config = engine_config()
    assert RequestTable.of(config, torch.device("cpu")) is RequestTable.of(config, torch.device("cpu"))
    assert RequestTable.of(config, torch.device("cpu")) is not RequestTable.of(engine_config(), torch.device("cpu"))


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        pytest.param({"preference": "knd"}, "unknown expert 'knd'. Did you mean 'kind'?", id="unknown"),
        pytest.param({"preference": {"kind": -1}}, "finite numbers of at least 0", id="negative"),
        pytest.param({"preference": '{"kind": 1'}, "`preference` is no JSON", id="json"),
        pytest.param({"preference": '{"kind": 1, "kind": 0}'}, "'kind' is there twice", id="twice"),
        pytest.param({"preference": 3.0}, "must be an expert's name, a mapping", id="kind"),
        pytest.param({"preference": [1.0, 2.0]}, "has 2 weights, but the ensemble has 4 experts", id="number"),
        pytest.param({"preference_text": 5}, "must be a string", id="text"),
        pytest.param({"preference_ids": [400]}, "the PCM has 99 tokens", id="token"),
        pytest.param({"preference_ids": [[1], [2, 3]]}, "expected sequence of length", id="ragged"),
        pytest.param({"preference_ids": "x"}, "`preference_ids` is no JSON", id="ids"),
        pytest.param({"preference_text": "a", "preference_ids": [40]}, "say the same thing", id="both"),
        pytest.param({"preferences": "kind"}, "has no argument 'preferences'", id="name"),
        pytest.param({"preference": "kind", "preference_text": "a" * 300}, "which the PCM has no room for", id="long"),
        pytest.param({"preference": "kind", "preference_ids": [40] * 1100}, "may have 1024 tokens", id="longer"),
        pytest.param({"preference_text": " " * 30000}, "may have 20000 characters", id="endless"),
        pytest.param({"preference": "[" * 10000}, "is no JSON", id="deep"),
        pytest.param({"preference": torch.ones(4)}, "must be what JSON carries", id="tensor"),
        pytest.param({"preference": ["brief", "kind", "rude"]}, "wants 3 experts at once", id="slots"),
    ],
)
def test_a_bad_request_is_refused_where_it_arrives(two_slots, extra_args, message):
    with pytest.raises(ValueError, match=message):
        two_slots.validate_params(params(**extra_args))


def test_what_cannot_be_added_up_is_refused_where_it_arrives():
    check = getattr(PROCESSORS, front_end_processor(engine_config("adapters-and-a-prompt")).rpartition(".")[2])
    for extra_args in ({"preference": "kind"}, {}):
        check.validate_params(params(**extra_args))
    with pytest.raises(ValueError, match="cannot mix expert 'plain'"):
        check.validate_params(params(preference=["kind", "plain"]))


def test_each_engine_of_a_process_checks_by_its_own_ensemble():
    one, other = (front_end_processor(engine_config(name)) for name in ("probabilities", "product"))
    below_zero = params(preference={"kind": -1.0})
    with pytest.raises(ValueError, match="at least 0"):
        getattr(PROCESSORS, one.rpartition(".")[2]).validate_params(below_zero)
    getattr(PROCESSORS, other.rpartition(".")[2]).validate_params(below_zero)
    assert issubclass(PROCESSORS.v1_of_another_process, PreferenceProcessor)


def test_a_mapping_says_the_same_as_json_in_a_string(processor):
    weights = {"kind": 1, "rude": 0.5}
    read = processor.table.reader.read
    assert read(params(preference=weights)) == read(params(preference=json.dumps(weights)))


def test_descriptions_of_all_that_run_find_room():
    reader = WishReader(engine_config(places=256))
    reader.read(params(preference_ids=[40] * 256))
    with pytest.raises(ValueError, match="may have 256 tokens"):
        reader.read(params(preference_ids=[40] * 257))


@pytest.mark.parametrize(
    "held", [{"preference": ["kind", "rude"]}, {"preference_text": "Say it plainly."}, {"preference_ids": [40, 41]}]
)
def test_what_a_generation_config_says_holds_where_a_request_says_nothing(held, tmp_path):
    for path in (REFERENCES / "probabilities").iterdir():
        (tmp_path / path.name).symlink_to(path.resolve())
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").write_text(json.dumps(settings | held))

    read, plain = WishReader(engine_config(str(tmp_path))).read, WishReader(engine_config()).read
    assert read(None) == plain(params(**held)) != plain(None)
    asked = {"preference": "brief", "preference_ids": [50]}  # words and tokens are one thing
    assert read(params(**asked)) == plain(params(**asked))


def test_weights_stay_what_they_are_where_the_model_has_16_bits():
    """Under the V2 runner the table is made with the model."""
    try:
        torch.set_default_dtype(torch.bfloat16)
        table = RequestTable(engine_config(), torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    table.set(0, params(preference={"brief": 1.0, "rude": 0.3}), [1])
    assert table.batch(1).weights.tolist() == [pytest.approx([1.0, 0.0, 0.0, 0.3])]
