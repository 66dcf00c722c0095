"""A server verified: what it computes, by the checks that a folder has too, then its protocol."""

from pathlib import Path

from f2llm.errors import F2Error, UsageError
from f2llm.verify.computed import COMPUTED_CHECKS
from f2llm.verify.findings import Check, Report, failed, passed, run_checks, skipped
from f2llm.verify.golden import golden_check
from f2llm.verify.protocol import PROTOCOL_CHECKS
from f2llm.verify.server import Server, connected


def verify_server(
    url: str,
    *,
    model: str | None = None,
    key: str | None = None,
    golden: Path | None = None,
    query_prompt: str | None = None,
) -> Report:
    """All checks of an OpenAI-compatible embeddings server.

    Args:
        url: as in `http://localhost:8000/v1`.
        model: the name to ask for; the only one that the server lists by default.
        key: the API key.
        golden: a file of golden vectors of the same model.
        query_prompt: what should stand in front of queries; what the server says by default.

    Raises UsageError if several models are there and none is chosen.
    """
    checks: list[Check[Server]] = [*COMPUTED_CHECKS, *PROTOCOL_CHECKS]
    if golden is not None:
        checks.append(("golden", golden_check(golden, empty_texts=False)))
    try:
        with connected(url, model, key, query_prompt) as server:
            findings = {"answers": passed(f"{server.model or 'a model'}, {server.width} dimensions")}
            findings |= run_checks(checks, server)
    except UsageError:
        raise
    except F2Error as error:
        fix = "Check the address (up to /v1), --model and --api-key-env, and that the server runs."
        findings = {"answers": failed(str(error), fix)}
        findings |= {name: skipped("not asked, since the server gives no vectors") for name, _ in checks}
    if golden is None:
        findings["golden"] = skipped(
            "no golden vectors to compare with; --golden names a model's golden.json"
        )
    return Report(url, findings)
