"""Check, describe, upload, check again."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from huggingface_hub import CommitInfo, HfApi, get_token
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from modeling_pcm_ensemble import PCMEnsembleForCausalLM

from .card import GENERATED, code_blocks, model_card
from .clean_process import run

TRAINING = "pcm_training.json"  # what a trainer's `save_model` leaves beside the ensemble
SCRIPT = Path(__file__).with_name("clean_process.py")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
LEFT_OUT = (".*", "*/.*", "__pycache__/*", *PICKLES)
STALE = ("*.safetensors", "*.safetensors.index.json")


def hub_upload(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    thin: bool = False,
    revision: str | None = None,
    results: str | os.PathLike | None = None,
    dry_run: bool = False,
    token: str | None = None,
) -> CommitInfo | None:
    r"""
    Upload an ensemble that `save_pretrained` wrote, if it works for somebody without this package.

    1. It is loaded in a clean process by `trust_remote_code=True`, generates, and is compared with the model here.
    2. Its model card is written, and the card's code is run. A README.md that was not written here is kept.
    3. What will be uploaded is shown, and uploaded.
    4. The commit is pulled into an empty cache by a clean process, and compared once more.

    Args:
        folder (`str`): the ensemble's.
        repo_id (`str`): `owner/name`.
        private (`bool`, *optional*): if the repository is new.
        thin (`bool`): upload PCM and adapters alone, see `save_pretrained`.
        revision (`str`, *optional*): the branch; made if it is not there.
        results (`str`, *optional*): an evaluation's report.json, for the card.
        dry_run (`bool`): do 1 to 3, but upload nothing.
        token (`str`, *optional*): defaults to the one of `hf auth login`.

    Returns:
        `CommitInfo`, or None if nothing was uploaded.

    Raises:
        ValueError: if the folder is no ensemble, or a check fails.
        HfHubHTTPError: if the Hub refuses.
    """
    validate_repo_id(repo_id)
    api, console, token = HfApi(token=token), Console(soft_wrap=True), token or get_token()
    if not dry_run:
        api.whoami()  # refused now rather than after the checks
    if not (Path(folder) / "config.json").exists():
        raise ValueError(f"{str(folder)!r} has no config.json. Give a folder that `save_pretrained` wrote.")
    model = PCMEnsembleForCausalLM.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        staged = Path(folder)
        if thin:
            staged = work / "thin"
            model.save_pretrained(staged, thin=True, token=token)
            for name in ("README.md", TRAINING):
                if (Path(folder) / name).exists():
                    shutil.copy(Path(folder) / name, staged)
        check_same(model, str(staged), work, "The folder")
        console.print("The folder loads, generates and gives this model's logits in a clean process.")
        write_card(model, staged, repo_id, work, thin=thin, revision=revision, results=results, api=api)
        show_files(api, staged, console)
        if dry_run:
            console.print("A dry run: nothing was uploaded.")
            return None
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=staged,
            revision=revision,
            commit_message="Upload a PCM ensemble",
            ignore_patterns=list(LEFT_OUT),
            delete_patterns=list(STALE),
        )
        console.print(f"Uploaded: {commit.commit_url}")
        environment = {"HF_HOME": str(work / "empty cache")} | ({"HF_TOKEN": token} if token else {})
        check_same(model, repo_id, work, f"Commit {commit.oid} of {repo_id}", commit.oid, environment)
        console.print("Pulled into an empty cache, it gives this model's logits.")
        return commit


def check_same(
    model: PCMEnsembleForCausalLM,
    source: str,
    work: Path,
    label: str,
    revision: str = "",
    environment: dict[str, str] | None = None,
):
    """Refuse what a clean process does not load, or what gives it other logits or tokens than the model here."""
    input_ids = torch.arange(3, 11)[None] % model.config.vocab_size
    save_file({"input_ids": input_ids}, work / "inputs.safetensors")
    files = (str(work / "inputs.safetensors"), str(work / "outputs.safetensors"))
    source = source if revision else os.path.abspath(source)
    clean_process("logits", source, revision, *files, cwd=work, label=label, environment=environment)
    found, expected = load_file(files[1]), run(model, input_ids, torch)
    difference = (found["logits"] - expected["logits"]).nan_to_num(neginf=0, posinf=0).abs().max().item()
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1
    if difference > tolerance or not torch.equal(found["tokens"], expected["tokens"]):
        raise ValueError(
            f"{label} gives other results in a clean process than here: log-probabilities differ by up to "
            f"{difference:.3g}. Save the ensemble again."
        )


def write_card(model: PCMEnsembleForCausalLM, folder: Path, repo_id: str, work: Path, **facts):
    """Write README.md, unless a person did, and run its code with `folder` in the repository's place."""
    path = folder / "README.md"
    if path.exists() and GENERATED not in path.read_text(encoding="utf-8"):
        Console().print("README.md was not written here, and is kept.")
        return
    training = folder / TRAINING
    known = json.loads(training.read_text(encoding="utf-8")) if training.exists() else None
    card = model_card(model, repo_id, training=known, **facts)
    stand_in = work / "code" / repo_id
    stand_in.parent.mkdir(parents=True)
    stand_in.symlink_to(folder.resolve(), target_is_directory=True)
    (work / "card.py").write_text("\n".join(code_blocks(card.content)), encoding="utf-8")
    printed = clean_process("code", str(work / "card.py"), cwd=work / "code", label="The card's code")
    card.content = card.content.replace("PRINTED", printed.strip())
    card.validate()
    card.save(path)


def clean_process(*arguments: str, cwd: Path, label: str, environment: dict[str, str] | None = None) -> str:
    """What `clean_process.py` printed."""
    command = [sys.executable, str(SCRIPT), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | (environment or {}))
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if re.match(r"[\w.]+(Error|Exception)\b", line)]
        raise ValueError(f"{label} does not run in a clean process: {lines[-1] if lines else result.stderr[-2000:]}")
    return result.stdout


def show_files(api: HfApi, folder: Path, console: Console):
    """A table of what will be uploaded, and what is left out."""
    every = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    kept = list(filter_repo_objects(every, ignore_patterns=list(LEFT_OUT)))
    table = Table(title="To be uploaded")
    table.add_column("file")
    table.add_column("MB", justify="right")
    sizes = {name: (folder / name).stat().st_size / 1e6 for name in kept}
    for name, size in sizes.items():
        table.add_row(name, f"{size:.2f}")
    table.add_section()
    table.add_row(f"{len(kept)} files", f"{sum(sizes.values()):.2f}")
    console.print(table)
    if left_out := [name for name in every if name not in kept]:
        console.print(f"Left out (hidden files and pickles): {', '.join(left_out)}")
