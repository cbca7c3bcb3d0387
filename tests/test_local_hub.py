"""The Hub on this machine answers the real client as the real Hub does, and fails when told to."""

import time

import pytest
from hub_clients import output, run_client, start_client
from local_hub import Fault, LocalHub

PUSH = """
from huggingface_hub import HfApi
api = HfApi()
api.create_repo("owner/model", private=PRIVATE, exist_ok=True)
print(api.upload_folder(repo_id="owner/model", folder_path=FOLDER, revision=REVISION, create_pr=PR).oid)
"""
PULL = """
from huggingface_hub import snapshot_download
print(snapshot_download("owner/model", revision=REVISION))
"""
LARGE = bytes(range(256)) * 4096  # 1 MB, uploaded as an LFS object


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "model.safetensors").write_bytes(LARGE)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Model\n")
    return folder


def run(script: str, hub: LocalHub, home, token: str | None = "hf_owner", **values):
    defaults = {"PRIVATE": False, "REVISION": None, "PR": False}
    return run_client(script, hub, home, token, **(defaults | values))


def test_what_is_pushed_can_be_pulled_at_any_of_its_commits(hub, folder, tmp_path):
    first = output(run(PUSH, hub, tmp_path / "a", FOLDER=str(folder)))
    (folder / "config.json").write_text('{"new": 1}')
    second = output(run(PUSH, hub, tmp_path / "a", FOLDER=str(folder)))
    assert sum(line.startswith("PUT") for line in hub.requests) == 1  # the large file did not change
    for revision, text in ((None, '{"new": 1}'), (first, "{}"), (second, '{"new": 1}')):
        pulled = output(run(PULL, hub, tmp_path / "b", token=None, REVISION=revision))
        with open(f"{pulled}/config.json") as file:
            assert file.read() == text
        with open(f"{pulled}/sub/model.safetensors", "rb") as file:
            assert file.read() == LARGE


def test_a_pull_request_leaves_the_main_branch_alone(hub, folder, tmp_path):
    output(run(PUSH, hub, tmp_path / "a", FOLDER=str(folder)))
    main = hub.repositories["owner/model"].branches["main"]
    (folder / "config.json").write_text('{"new": 1}')
    request = output(run(PUSH, hub, tmp_path / "a", FOLDER=str(folder), PR=True))
    assert hub.repositories["owner/model"].branches == {"main": main, "refs/pr/1": request}
    pulled = output(run(PULL, hub, tmp_path / "b", REVISION="refs/pr/1"))
    with open(f"{pulled}/config.json") as file:
        assert file.read() == '{"new": 1}'


@pytest.mark.parametrize(
    ("token", "message"),
    [(None, "401"), ("hf_wrong", "401"), ("hf_reader", "404")],
    ids=["nobody", "invalid", "another-user"],
)
def test_a_private_repository_is_its_owners(hub, folder, tmp_path, token, message):
    output(run(PUSH, hub, tmp_path / "a", FOLDER=str(folder), PRIVATE=True))
    output(run(PULL, hub, tmp_path / "b"))
    refused = run(PULL, hub, tmp_path / "c", token=token)
    assert refused.returncode
    assert message in refused.stderr


def test_nobody_writes_into_another_users_repository(hub, folder, tmp_path):
    output(run(PUSH, hub, tmp_path / "a", FOLDER=str(folder)))
    refused = run(
        PUSH.replace("api.create_repo", "0 and api.create_repo"), hub, tmp_path / "b", "hf_reader", FOLDER=str(folder)
    )
    assert "403" in refused.stderr


@pytest.mark.parametrize(
    ("call", "status"),
    [
        ('api.create_repo("owner/model")', "409"),
        (
            'api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="owner/model", parent_commit="0" * 40)',
            "412",
        ),
        ('api.model_info("owner/nothing")', "404"),
        ('api.model_info("owner/model", revision="nowhere")', "404"),
    ],
    ids=["exists", "moved-on", "no-repository", "no-revision"],
)
def test_what_cannot_be_done_has_the_hubs_status(hub, folder, tmp_path, call, status):
    output(run(PUSH, hub, tmp_path / "a", FOLDER=str(folder)))
    refused = run(f"from huggingface_hub import HfApi\napi = HfApi()\n{call}", hub, tmp_path / "a")
    assert refused.returncode
    assert status in refused.stderr


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", "POST .*/objects/batch", status=500),
        Fault("status", "POST .*/preupload/", status=429, retry_after=1),
        Fault("status", "PUT /lfs/", status=503),
        Fault("drop", "PUT /lfs/"),
        Fault("slow", "PUT /lfs/"),
    ],
    ids=["500", "429", "503-from-storage", "dropped", "slow"],
)
def test_a_push_survives_a_passing_fault(hub, folder, tmp_path, fault):
    hub.faults.append(fault)
    output(run(PUSH, hub, tmp_path / "a", FOLDER=str(folder)))
    assert fault.times == 0
    assert hub.repositories["owner/model"].commits[hub.repositories["owner/model"].branches["main"]][
        "sub/model.safetensors"
    ] == (LARGE, True)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("drop", "GET .*/resolve/.*safetensors"),
        Fault("slow", "GET .*/resolve/.*safetensors"),
    ],
    ids=["dropped", "slow"],
)
def test_a_pull_survives_a_passing_fault(hub, folder, tmp_path, fault):
    output(run(PUSH, hub, tmp_path / "a", FOLDER=str(folder)))
    hub.faults.append(fault)
    pulled = output(run(PULL, hub, tmp_path / "b"))
    assert fault.times == 0
    with open(f"{pulled}/sub/model.safetensors", "rb") as file:
        assert file.read() == LARGE


def test_an_upload_that_was_killed_can_be_run_again(hub, folder, tmp_path):
    hub.faults.append(Fault("slow", "PUT /lfs/", seconds=2))
    home = tmp_path / "a"
    client = start_client(PUSH, hub, home, PRIVATE=False, REVISION=None, PR=False, FOLDER=str(folder))
    while not any(request.startswith("PUT") for request in hub.requests):
        assert client.poll() is None
        time.sleep(0.05)
    client.kill()
    client.wait()
    assert len(hub.repositories["owner/model"].commits) == 1  # the empty one
    output(run(PUSH, hub, home, FOLDER=str(folder)))
    assert hub.files("owner/model")["sub/model.safetensors"] == LARGE


def test_what_arrives_damaged_is_refused(hub, folder, tmp_path):
    hub.faults.append(Fault("mangle", "PUT /lfs/"))
    refused = run(PUSH, hub, tmp_path / "a", FOLDER=str(folder))
    assert "400" in refused.stderr
    assert len(hub.repositories["owner/model"].commits) == 1


def test_a_pull_that_failed_can_be_run_again(hub, folder, tmp_path):
    output(run(PUSH, hub, tmp_path / "a", FOLDER=str(folder)))
    hub.faults.append(Fault("status", "GET .*/resolve/.*safetensors", status=503))
    failed = run(PULL, hub, tmp_path / "b")
    assert "503" in failed.stderr
    assert not list((tmp_path / "b").rglob("model.safetensors"))  # nothing half-written
    output(run(PULL, hub, tmp_path / "b"))
