"""Fail immediately without a connection to the hub, not after a minute of retries."""

import os
import socket
import sys
import threading
from urllib.parse import urlsplit

WAIT_SECONDS = 3.0


def go_offline_if_unreachable(host: str | None = None) -> bool:
    """Set HF_HUB_OFFLINE if the hub does not answer within 3 seconds; returns whether it is set.

    Then only what is in the hub's cache is read, and a name that is not there fails immediately. `host` is by default that
    of HF_ENDPOINT. Behind a proxy nothing is tried.
    """
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() not in ("", "0", "NO", "FALSE", "OFF"):
        return True
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return False
    url = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    # In a thread, because looking up a name has no time limit.
    answers: list[bool] = []
    address = (host or url.hostname or "huggingface.co", url.port or 443)
    thread = threading.Thread(target=lambda: answers.append(_answers(address)), daemon=True)
    thread.start()
    thread.join(WAIT_SECONDS)
    if any(answers):
        return False
    print(f"epochal: {address[0]} cannot be reached, so only its cached files are used.", file=sys.stderr)
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Modules that are imported already have read the variable.
    for module, name in (("huggingface_hub.constants", "HF_HUB_OFFLINE"), ("datasets.config", "HF_HUB_OFFLINE")):
        if module in sys.modules:
            setattr(sys.modules[module], name, True)
    return True


def _answers(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=WAIT_SECONDS).close()
    except OSError:
        return False
    return True
