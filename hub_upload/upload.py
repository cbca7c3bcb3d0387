"""Check, describe, upload, check again."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard, get_token
from huggingface_hub.errors import HTTPError  # of httpx or httpx2, by the client's version
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from modeling_pcm_ensemble import PCMEnsembleConfig, PCMEnsembleForCausalLM
from modeling_pcm_ensemble.checkpoint_staging import (
    ADAPTER_CONFIG,
    CONFIG,
    INDEX,
    TOKENIZER,
    WEIGHTS,
    finish_save,
    staged_folder,
)
from modeling_pcm_ensemble.checkpoint_trust import server_address

from .card import GENERATED, code_blocks, model_card, read_report
from .clean_process import LOGITS, run

TRAINING = "pcm_training.json"  # what a trainer's `save_model` leaves beside the ensemble
SCRIPT = Path(__file__).with_name("clean_process.py")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.npz", "*.npy")
LEFT_OUT = (".*", "*/.*", "*__pycache__/*", "checkpoint-*", *PICKLES)
WEIGHT_FILES = ("*.safetensors", "*.gguf", "*.onnx", "*.h5", "*.msgpack", *PICKLES)
OF_MODELS = (CONFIG, ADAPTER_CONFIG, "model_index.json", *WEIGHT_FILES)
MODEL_TYPE = PCMEnsembleConfig.model_type
OF_TRANSFORMERS = "This model card has been automatically generated"  # by `push_to_hub`
PRINTED = "```text\nPRINTED\n```"


def hub_upload(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    thin: bool = False,
    revision: str | None = None,
    results: str | os.PathLike | None = None,
    datasets: list[str] | None = None,
    endpoints: Mapping[str, str | None] | None = None,
    dry_run: bool = False,
    token: str | None = None,
) -> CommitInfo | None:
    r"""
    Upload an ensemble that `save_pretrained` wrote, if it works for somebody without this package.

    1. It is loaded in a clean process by `trust_remote_code=True`, generates, and is compared with the model here.
    2. Its model card is written into the folder, or with `thin` into the upload alone, and the card's code is run. A
       README.md of a person's is kept.
    3. What will be uploaded, and what is deleted there, is shown; then it is uploaded.
    4. The commit is pulled into an empty cache by a clean process, and compared once more.

    Args:
        folder (`str`): the ensemble's.
        repo_id (`str`): `owner/name`; refused where the branch that is written to holds another kind of model.
        private (`bool`, *optional*): for a new repository; one that is public is then refused.
        thin (`bool`): upload PCM and adapters alone, see `save_pretrained`.
        revision (`str`, *optional*): the branch; made if it is not there.
        results (`str`, *optional*): an evaluation's report.json, for the card.
        datasets (`list[str]`, *optional*): what the PCM was trained on, for the card.
        endpoints (`Mapping[str, str | None]`, *optional*): addresses that its experts are behind, which the checks may
            ask, each with the name of the environment variable that holds its key, or None. The card names them.
        dry_run (`bool`): do 1 to 3, but upload nothing.
        token (`str`, *optional*): defaults to the one of `hf auth login`.

    Returns:
        `CommitInfo`, or None if nothing was uploaded.

    Raises:
        ValueError: if the folder is no ensemble, the repository is not for it, or a check fails.
        ConnectionError: if the Hub cannot be reached, which a dry run asks too, or the connection is lost.
        HfHubHTTPError: if the Hub refuses.
        RuntimeError: if an endpoint does not answer.
    """
    validate_repo_id(repo_id)
    if repo_id.count("/") != 1:
        raise ValueError(f"The repository must be given as owner/name, got {repo_id!r}.")
    token = token or get_token()
    api, console = HfApi(token=token), Console(soft_wrap=True)
    environment = {"HF_TOKEN": token} if token else {}

    folder = Path(folder)
    check_folder(folder, endpoints or {})
    report = None if results is None else read_report(results)
    with hub_asked(api), tempfile.TemporaryDirectory() as name:
        if not dry_run:
            check_owner(api.whoami(), repo_id)
        check_repository(api, repo_id, revision, private)
        loading = loading_options(endpoints)
        model = load(folder, token, loading)

        work = Path(name)
        staged = stage_thin(model, folder, work / "thin", token, console) if thin else folder
        check_same(model, os.path.abspath(staged), work, "The folder", loading, environment=environment)
        console.print("The folder loads, generates and gives this model's logits in a clean process.")

        facts = {"revision": revision, "report": report, "datasets": datasets, "api": api, "loading": loading}
        write_card(model, staged, repo_id, work, environment, **facts)
        kept = show_files(staged, console)
        if dry_run:
            console.print("A dry run: nothing was uploaded.")
            return None

        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = upload_files(api, repo_id, staged, kept, revision, console)
        check_same(
            model,
            repo_id,
            work,
            f"What was uploaded (commit {commit.oid} of {repo_id}, which stays there)",
            loading,
            revision=commit.oid,
            environment=environment | empty_cache(work),
        )
        console.print("Pulled into an empty cache, it gives this model's logits.")
        return commit


@contextmanager
def hub_asked(api: HfApi) -> Iterator[None]:
    """Say in one sentence that an exchange with the Hub failed."""
    try:
        yield
    except OSError:  # what the Hub refuses is one, too
        raise
    except (HTTPError, RuntimeError) as error:
        failure = error if isinstance(error, HTTPError) else error.__cause__  # a file's, of which the client says less
        if not isinstance(failure, HTTPError):
            raise
        raise ConnectionError(
            f"The exchange with the Hub at {api.endpoint} failed: {failure}. Check the connection and run this again: "
            "what has arrived is not sent twice."
        ) from error


def upload_files(
    api: HfApi, repo_id: str, folder: Path, names: list[str], revision: str | None, console: Console
) -> CommitInfo:
    """Upload files of a folder, in place of an earlier checkpoint's; a person's README.md stays."""
    of_checkpoints = (WEIGHTS, INDEX, TOKENIZER)
    every = api.list_repo_files(repo_id, revision=revision)
    there = [name for name in every if any(kind.fullmatch(name.partition("/")[0]) for kind in of_checkpoints)]
    stale = [name for name in there if name not in names]
    if stale:
        console.print(Text(f"Deleted there, being of an earlier checkpoint: {', '.join(stale)}"))
    if "README.md" in names and keeps_its_card(api, repo_id, folder, revision):
        names = [name for name in names if name != "README.md"]
        console.print("The repository's README.md was written by a person, and stays.")

    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        commit_message="Upload a PCM ensemble",
        allow_patterns=[glob_of(name) for name in names],
        delete_patterns=[glob_of(name) for name in stale],
    )
    console.print(f"Uploaded: {commit.commit_url}")
    return commit


def check_folder(folder: Path, endpoints: Mapping[str, str | None]):
    """
    Check that a folder is an ensemble's, and finish an interrupted save to it.

    Raises:
        ValueError: if it is none, or names an endpoint that is not one of `endpoints`.
    """
    path = folder / "config.json"
    finish_save(folder)
    if not path.exists():
        raise ValueError(f"{str(folder)!r} has no config.json. Give a folder that `save_pretrained` wrote.")
    config = json.loads(path.read_text(encoding="utf-8"))
    if (kind := config.get("model_type")) != MODEL_TYPE:
        raise ValueError(f"{str(folder)!r} holds a model of another kind ({kind}), not an ensemble.")

    known = {server_address(address) for address in endpoints}
    for endpoint in [backbone.get("endpoint") for backbone in config.get("backbones", ())]:
        if endpoint is not None and server_address(endpoint) not in known:
            raise ValueError(
                f"{str(folder)!r} names the endpoint {endpoint!r}. The checks would send texts there, and the card "
                f"would name it. If that is wanted, give it: `--endpoints {endpoint}`."
            )


def check_owner(user: dict, repo_id: str):
    """
    Check that a namespace is the user's, or of one of the user's organisations.

    Raises:
        ValueError: if it is neither.
    """
    names = [user["name"], *(organisation["name"] for organisation in user.get("orgs", ()))]
    if (owner := repo_id.split("/")[0]) not in names:
        raise ValueError(
            f"You are {user['name']} on the Hub, who may write to {', '.join(names)}, but not to {owner}."
        )


def loading_options(endpoints: Mapping[str, str | None] | None) -> dict[str, Any]:
    """Return what `from_pretrained` is given, here and by the card's readers, to ask endpoints."""
    if not endpoints:
        return {}
    keys = {address: variable for address, variable in endpoints.items() if variable}
    return {"allow_endpoints": list(endpoints)} | ({"endpoint_keys": keys} if keys else {})


def load(folder: Path, token: str | None, loading: dict[str, Any]) -> PCMEnsembleForCausalLM:
    """
    Load a folder's ensemble.

    Raises:
        ValueError: if its files are not those of one.
    """
    try:
        return PCMEnsembleForCausalLM.from_pretrained(folder, token=token, **loading)
    except (SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"{str(folder)!r} cannot be loaded: {error}") from error


def keeps_its_card(api: HfApi, repo_id: str, folder: Path, revision: str | None) -> bool:
    """Return whether the repository has a card of a person's, in place of which there is only a generated one."""
    if GENERATED not in (folder / "README.md").read_text(encoding="utf-8"):
        return False
    if not api.file_exists(repo_id, "README.md", revision=revision):
        return False
    text = Path(api.hf_hub_download(repo_id, "README.md", revision=revision)).read_text(encoding="utf-8")
    return GENERATED not in text and OF_TRANSFORMERS not in text


def check_repository(api: HfApi, repo_id: str, revision: str | None, private: bool | None):
    """
    Check that a repository that is there is private where that is wanted, and holds an ensemble or no model where it
    is written to.

    Raises:
        ValueError: if it is not so.
    """
    if not api.repo_exists(repo_id):
        return

    if private and not api.repo_info(repo_id).private:
        raise ValueError(f"{repo_id} is there already, and public. Make it private, or leave `private` out.")
    if revision is not None and not api.revision_exists(repo_id, revision):
        revision = None  # of which it is made
    names = api.list_repo_files(repo_id, revision=revision)
    kind = None
    if CONFIG in names:
        with open(api.hf_hub_download(repo_id, CONFIG, revision=revision), encoding="utf-8") as file:
            kind = json.load(file).get("model_type")
    of_models = list(filter_repo_objects(names, allow_patterns=list(OF_MODELS)))
    if of_models and kind != MODEL_TYPE:
        raise ValueError(
            f"{repo_id} holds a model of another kind ({kind or of_models[0]}) in its branch {revision or 'main'}. "
            "Give another name or branch."
        )


def stage_thin(model: PCMEnsembleForCausalLM, folder: Path, target: Path, token: str | None, console: Console) -> Path:
    """
    Write the thin form of a folder, with what its author put beside the checkpoint and an upload takes, and return
    where.
    """
    model.save_pretrained(target, thin=True, token=token)
    kept, left_out = files_of(folder)
    for name in kept:
        if not (target / name).exists() and not any(kind.fullmatch(name) for kind in (WEIGHTS, INDEX)):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name, target / name)

    print_left_out(left_out, console)
    return target


def check_same(
    model: PCMEnsembleForCausalLM,
    source: str,
    work: Path,
    label: str,
    loading: dict[str, Any],
    revision: str = "",
    environment: dict[str, str] | None = None,
):
    """
    Check that a clean process loads a folder or repository, and gets the logits and tokens of the model here.

    Args:
        model (`PCMEnsembleForCausalLM`): the model here.
        source (`str`), revision (`str`): what the clean process loads.
        work (`Path`): a folder for what the two tell each other.
        label (`str`): names the source in errors.
        loading (`dict`): from [`loading_options`].
        environment (`dict[str, str]`, *optional*): of the clean process, on top of this one's.

    Raises:
        ValueError: if it does not load, or gives something else.
    """
    input_ids = torch.arange(3, 11)[None] % model.config.vocab_size
    save_file({"input_ids": input_ids}, work / "inputs.safetensors")
    files = (str(work / "inputs.safetensors"), str(work / "outputs.safetensors"))
    asked = ("logits", source, revision, *files, json.dumps(loading))
    clean_process(*asked, cwd=work, label=label, with_package=bool(loading), environment=environment)

    found, expected = load_file(files[1]), run(model, input_ids, torch)
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1
    if loading:  # servers round as they like, and a tie may end otherwise
        found, expected = ({name: given[name].exp() for name in LOGITS} for given in (found, expected))
        tolerance = 0.05
    try:
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)  # NaN equals nothing
    except AssertionError as error:
        raise ValueError(f"{label} gives other results in a clean process than here. {error}") from error


def empty_cache(work: Path) -> dict[str, str]:
    """Return the settings of a process that has nothing of the Hub's yet, whatever those of this one are."""
    cache = work / "empty cache"
    places = {"HF_HOME": cache, "HF_HUB_CACHE": cache / "hub", "HF_MODULES_CACHE": cache / "modules"}
    offline = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    return offline | {name: str(place) for name, place in places.items()}


def write_card(
    model: PCMEnsembleForCausalLM, folder: Path, repo_id: str, work: Path, environment: dict[str, str], **facts
):
    """
    Write README.md, unless a person did, and run its code with `folder` in the repository's place.

    Args:
        work (`Path`): a folder for the code.
        environment (`dict[str, str]`): of the process that runs it, on top of this one's.
        facts: what [`model_card`] takes beyond the model and its repository.

    Raises:
        ValueError: if the code does not run, or the Hub would refuse the card.
    """
    path = folder / "README.md"
    if path.exists() and GENERATED not in path.read_text(encoding="utf-8"):
        Console().print("README.md was not written here, and is kept; its code is not run.")
        ModelCard.load(path).validate()
        return

    training, config = folder / TRAINING, json.loads((folder / "config.json").read_text(encoding="utf-8"))
    known = json.loads(training.read_text(encoding="utf-8")) if training.exists() else None
    card = model_card(model, repo_id, training=known, thin=config.get("thin") is not None, **facts)

    # Its code names the repository, which a link stands in for.
    stand_in = work / "code" / repo_id
    stand_in.parent.mkdir(parents=True)
    stand_in.symlink_to(folder.resolve(), target_is_directory=True)
    (work / "card.py").write_text("\n".join(code_blocks(card.content)), encoding="utf-8")
    printed = clean_process(
        "code",
        str(work / "card.py"),
        cwd=work / "code",
        label="The card's code",
        with_package=bool(facts["loading"]),
        environment=environment,
    )

    card.content = card.content.replace(PRINTED, PRINTED.replace("PRINTED", printed.strip()), 1)
    card.validate()
    with staged_folder(folder) as staging:
        card.save(Path(staging) / path.name)
    Console().print("Wrote README.md, the model card; its code runs.")


def clean_process(
    *arguments: str, cwd: Path, label: str, with_package: bool, environment: dict[str, str] | None = None
) -> str:
    """
    Run `clean_process.py`, and return what it printed. `with_package`, it finds this package: no checkpoint brings
    the code that asks endpoints.

    Raises:
        ValueError: if it fails, with its last error.
    """
    command = [sys.executable, str(SCRIPT), *(["--with-package"] if with_package else []), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | (environment or {}))
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if re.match(r"[\w.]+(Error|Exception)\b", line)]
        raise ValueError(f"{label} does not run in a clean process: {lines[-1] if lines else result.stderr[-2000:]}")
    return result.stdout


def files_of(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of the files in a folder that an upload takes, and of those that it leaves out."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    every = sorted(path.relative_to(folder).as_posix() for path in paths)
    inside = [name for name in every if (folder / name).resolve().is_relative_to(folder.resolve())]
    kept = list(filter_repo_objects(inside, ignore_patterns=list(LEFT_OUT)))
    return kept, [name for name in every if name not in kept]


def print_left_out(names: list[str], console: Console):
    if names:
        kinds = "hidden files, checkpoints of training, pickles, links to elsewhere"
        console.print(Text(f"Left out ({kinds}): {', '.join(names)}"))


def show_files(folder: Path, console: Console) -> list[str]:
    """Show what will be uploaded, and what is left out, and return the names of the first."""
    kept, left_out = files_of(folder)
    table = Table(title="To be uploaded")
    table.add_column("file")
    table.add_column("MB", justify="right")
    sizes = {name: (folder / name).stat().st_size / 1e6 for name in kept}
    for name, size in sizes.items():
        table.add_row(Text(name), f"{size:.2f}")
    table.add_section()
    table.add_row(f"{len(kept)} files", f"{sum(sizes.values()):.2f}")
    console.print(table)

    print_left_out(left_out, console)
    return kept


def glob_of(name: str) -> str:
    """Return a pattern that matches this name alone."""
    return re.sub(r"([*?[])", r"[\1]", name)
