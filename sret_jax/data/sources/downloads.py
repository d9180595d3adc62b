"""Downloads by TFDS; explains in one sentence if the network, an address or a file is wrong."""

import contextlib
import functools
import re
import threading
import time
import urllib.error
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn
from urllib.parse import urlsplit

import requests
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import downloader
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
from tensorflow_datasets.core.download.util import DownloadError

from sret_jax.errors import UserError, few

ANSWER_SECONDS = 10.0
TIMEOUTS = (ANSWER_SECONDS, 60.0)  # to connect, and between two pieces of a file; TFDS sets none


@contextlib.contextmanager
def clear_downloads(builder: tfds.core.DatasetBuilder) -> Iterator[None]:
    """Turns errors of the enclosed `download_and_prepare` into a UserError.

    TFDS would retry an address that does not answer for minutes, so all hosts are asked first. If
    none answers, only files that were downloaded before can be prepared. A download that stalls
    for a minute fails.
    """
    addresses = {urlsplit(url).netloc: url for url in _addresses(builder)}
    reasons = _unreachable(list(addresses.values()))
    open_address = downloader._open_with_requests
    open_in_time = functools.partial(open_address, timeout=TIMEOUTS)
    if addresses and len(reasons) == len(addresses):
        reason = next(iter(reasons.values()))
        if not any((builder.data_dir_root / "downloads").glob("*")):
            raise _no_network(builder, list(addresses), reason)
        open_in_time = functools.partial(_fail, reason)
    downloader._open_with_requests = open_in_time
    try:
        yield
    except (requests.RequestException, urllib.error.URLError) as e:
        raise _no_network(builder, list(addresses), _reason(e)) from e
    except DownloadError as e:
        raise UserError(
            f"{builder.name} cannot be downloaded: {e} If the address has moved, a newer TFDS "
            "may know the new one (pip install --upgrade tensorflow-datasets)"
        ) from e
    except NonMatchingChecksumError as e:
        address = re.search(r"https?://[^\s,]+", str(e))
        raise UserError(
            f"what {address[0] if address else 'an address'} gives is not the published file of "
            f"{builder.name}: its checksum differs; start again in case the download was cut off, "
            "or try a newer TFDS (pip install --upgrade tensorflow-datasets)"
        ) from e
    finally:
        downloader._open_with_requests = open_address


def _fail(reason: str, url: str, **settings: Any) -> NoReturn:
    del url, settings
    raise requests.ConnectionError(reason)


def _no_network(builder: tfds.core.DatasetBuilder, hosts: Sequence[str], reason: str) -> UserError:
    where = few(hosts, 3) if hosts else "the web"
    return UserError(
        f"{builder.name} is downloaded from {where}, which cannot be reached ({reason}); "
        "set HTTPS_PROXY if the network needs a proxy, or prepare it on a machine with a network "
        f"and copy it to {builder.data_dir}"
    )


def _addresses(builder: tfds.core.DatasetBuilder) -> list[str]:
    """The addresses that TFDS downloads from, without those that users download from themselves."""
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        return []
    return [url for url in builder.url_infos or () if url.startswith(("http://", "https://"))]


def _unreachable(urls: Sequence[str]) -> dict[str, str]:
    """Why some addresses do not answer; any answer counts, even an error page."""
    reasons = dict.fromkeys(urls, f"no answer within {ANSWER_SECONDS:.0f} s")

    def ask(url: str) -> None:
        try:
            requests.get(url, stream=True, timeout=ANSWER_SECONDS).close()
        except requests.RequestException as e:
            reasons[url] = _reason(e)
        else:
            del reasons[url]

    # Daemon threads, because nothing limits the time of a name look-up.
    threads = [threading.Thread(target=ask, args=(url,), daemon=True) for url in urls]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + ANSWER_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return dict(reasons)


def _reason(error: BaseException) -> str:
    """The operating system's message, which the errors of the libraries wrap."""
    while error.__context__:
        error = error.__context__
    return getattr(error, "strerror", None) or str(error)
