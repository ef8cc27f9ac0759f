"""Asking the Hugging Face Hub for a repository once, before any library starts to retry."""

from __future__ import annotations

from codebook_schemas import UserError


def looks_local(name: str) -> bool:
    """Whether a name can only be meant as a folder: a Hub id is owner/name."""
    return name.startswith((".", "/", "~")) or name.count("/") != 1


def hub_answers(name: str, revision: str | None, kind: str, file: str) -> bool:
    """True when the Hub has the model repository `name`; False when it cannot be reached but its cache holds `file` of it.

    Takes one request of at most `HF_HUB_ETAG_TIMEOUT` seconds (10). Without a network transformers would retry every file for
    half a minute: what this returns tells it whether to ask at all (`local_files_only`).

    Args:
        name: owner/name; there is no folder of that name.
        revision: branch, tag or commit.
        kind: what it is, for messages.
        file: a file that every such repository has.

    Raises:
        UserError: the Hub has no such repository or revision, or does not show it to this user; or it cannot be reached and its
            cache holds nothing of that name.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        HfApi().repo_info(name, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except GatedRepoError:
        raise UserError(f"{kind} {name} is gated: ask for access on its Hub page, then run `hf auth login`") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"there is no folder {name}, and the Hub has no {kind} of that name (a private one needs `hf auth login`)"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{kind} {name} has no revision {revision} on the Hub") from None
    except HFValidationError:
        raise UserError(f"there is no folder {name}, and a Hub id cannot look like that") from None
    except Exception as error:  # no network, offline mode, a server in trouble: HTTP clients have their own kinds for each
        if isinstance(try_to_load_from_cache(name, file, revision=revision), str):
            return False
        reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
        raise UserError(
            f"there is no folder {name}, the Hub cannot be reached ({reason}), and its cache holds no {kind} of that name: "
            "check the name or the network"
        ) from None
    return True
