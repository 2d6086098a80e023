"""Records of many seeds against servers of seven policies: a line for each verdict.

    python -m tests.support.verify_servers FIRST LAST     seeds; some 100 s each on two cores

Records are made in float32; servers run in float32 and in bfloat16, and are judged with their
log-probabilities and without. A process of its own: that of the tests compiles quickly and runs
slowly.
"""

import json
import sys

import swaa_jax as swaa
from swaa_jax.engine import EngineOptions
from swaa_jax.policy import AttentionPolicy
from swaa_jax.remote import Endpoint
from swaa_jax.serve.app import make_app, make_engine
from swaa_jax.serve.models import served_models
from swaa_jax.verify import RECORDED, ProbeOptions, Reply, ask_server, decide, make_record
from tests.support.served import running

POLICY = AttentionPolicy.parse("window=16,sinks=4,full_layers=1::2,decode=full")
SERVERS = {
    RECORDED: str(POLICY),
    "full attention": "full",
    "window - 1": "window=15,sinks=4,full_layers=1::2,decode=full",
    "window + 1": "window=17,sinks=4,full_layers=1::2,decode=full",
    "no sinks": "window=16,full_layers=1::2,decode=full",
    "full layers 0::2": "window=16,sinks=4,full_layers=0::2,decode=full",
    "window-only decode": "window=16,sinks=4,full_layers=1::2",
}


def main(seeds: range) -> None:
    tok = swaa.load_tokenizer("tiny-retriever")
    model, twin = (
        swaa.load_model("tiny-retriever", policy=POLICY, dtype=dtype)
        for dtype in ("float32", "bfloat16")
    )
    policies = {str(at): policy for at, policy in enumerate(SERVERS.values())}
    room = EngineOptions(num_slots=2, max_tokens=128, chunk_size=64, page_size=32)
    named = [served_models(one, tok, name="m", policies=policies) for one in (model, twin)]
    apps = [make_app(models, make_engine(models, room)) for models in named]
    with running(apps[0]) as one, running(apps[1]) as other:
        for seed in seeds:
            options = ProbeOptions(seed=seed)
            record = make_record(model, tok, POLICY, twin=twin, options=options)
            for dtype, served in {"float32": one, "bfloat16": other}.items():
                endpoint = Endpoint(url=f"{served.url}/v1")
                for at, name in enumerate(SERVERS):
                    replies = ask_server(record, endpoint, model=f"m:{at}")
                    plain = [Reply(text=reply.text) for reply in replies]
                    if seed == seeds[0]:  # else it is the same text
                        asked = ask_server(record, endpoint, model=f"m:{at}", logprobs=False)
                        assert asked == plain
                    for given in (replies, plain):
                        verdict = decide(record, given)
                        first, second = (one.log_likelihood for one in verdict.evidence[:2])
                        found = {
                            "seed": seed,
                            "dtype": dtype,
                            "runs": name,
                            "with_logprobs": verdict.has_logprobs,
                            "answer": verdict.answer,
                            "name": verdict.name,
                            "clear": round(first - second, 1),
                            "num_probes": verdict.num_probes,
                            "not_told_by_tokens": record.unclear,
                        }
                        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(range(int(sys.argv[1]), int(sys.argv[2]) + 1))
