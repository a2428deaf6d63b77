"""Upload a run's policy to the Hugging Face hub, on explicit request only."""

from __future__ import annotations

from pathlib import Path

from rluf.errors import DataError, ModelError
from rluf.models.hub import HUB_ID_PATTERN, list_hub_errors
from rluf.report.model_card import CARD_FOLDER
from rluf.utils.paths import suggest_run_folder

PUBLIC_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md", f"{CARD_FOLDER}/*.json")
"""Files of policy/ that are uploaded: weights, configuration, tokenizer, model card; nothing else that lies there."""


def upload_policy(run_folder: Path, repo_id: str, *, private: bool = True) -> str:
    """Upload policy/ with its model card to the model repository `repo_id` (owner/name) and return its URL.

    The repository is created if it does not exist, as a private one unless `private` is False; the visibility of an
    existing one stays. The hub, its token and the network are those of huggingface_hub (HF_ENDPOINT, HF_TOKEN,
    `hf auth login`). Raises DataError for a folder without a policy, ModelError for a bad name or a refused upload.
    """
    from huggingface_hub import HfApi

    policy_folder = run_folder / "policy"
    if not (policy_folder / "config.json").is_file():
        raise DataError(
            f"{policy_folder} has no config.json; name the folder of a finished run of rluf train"
            f"{suggest_run_folder(run_folder)}"
        )
    if not HUB_ID_PATTERN.fullmatch(repo_id):
        raise ModelError(f"expected a repository as owner/name, got {repo_id!r}")
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=policy_folder,
            allow_patterns=list(PUBLIC_FILES),
            commit_message="Upload a policy trained with rluf",
        )
    except list_hub_errors() as error:
        first_line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(
            f"{repo_id}: the upload to {api.endpoint} failed: {first_line}; log in with `hf auth login` as a user who "
            "may write to it, or set HF_TOKEN"
        ) from error
    return str(commit.repo_url)
