"""
An engine of vLLM that measures its own steps when it is told to, for `python -m benchmarks engine`.

    python -P benchmarks/engine_process.py FOLDER OPTIONS

FOLDER is a checkpoint, OPTIONS are JSON, for vLLM's `LLM`. Each line of the standard input is the batch and the tokens
of a measurement; a line that begins with RESULT answers with the seconds of one step of decoding.
"""

import json
import sys
import time

CONTEXT = 64
FEW = 8  # tokens of a generation that is subtracted, with its prefill


def main():
    from vllm import LLM, SamplingParams

    defaults = {"max_model_len": 512, "distributed_executor_backend": "uni"}
    llm = LLM(sys.argv[1], enable_prefix_caching=False, **defaults | json.loads(sys.argv[2]))

    def seconds(batch: int, tokens: int) -> float:
        prompts = [{"prompt_token_ids": [500 + row] * CONTEXT} for row in range(batch)]
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start

    print("RESULT ready", flush=True)
    for line in sys.stdin:
        batch, tokens = map(int, line.split())
        step = (seconds(batch, FEW + tokens) - seconds(batch, FEW)) / tokens
        print("RESULT", step, flush=True)


if __name__ == "__main__":
    main()
