"""The download, against a server on the loopback that misbehaves on demand."""

import concurrent.futures
import dataclasses
import hashlib
import http.server
import os
import re
import threading
import types
from pathlib import Path

import numpy as np
import pytest

from covid_flax.errors import UserError
from covid_flax.pretrained import fetch

CONTENT = np.random.default_rng(0).bytes(1_000_003)


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` at every path; notes each request's Range."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.ranges, self.cut_at = CONTENT, [], None
        self.honours_range, self.status = True, 200
        self.location, self.stall = "", threading.Event()
        self.stall.set()  # nothing waits for it then


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        s = self.server
        s.ranges.append(self.headers.get("Range"))
        if s.location and self.path != "/elsewhere":
            self.send_response(302)
            self.send_header("Location", s.location)
            return self.end_headers()
        if s.status != 200:
            return self.send_error(s.status)
        body, start = s.content, 0
        if s.honours_range and self.headers.get("Range"):
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        end = len(body) if s.cut_at is None else s.cut_at
        self.wfile.write(body[start:end])
        s.stall.wait(20)
        self.close_connection = True


@pytest.fixture
def server(monkeypatch):
    for key in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(key, raising=False)
    with Server() as s:
        thread = threading.Thread(target=s.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield s
        s.shutdown()
        thread.join()


@pytest.fixture
def published(server):
    return fetch.Published(
        url=f"http://127.0.0.1:{server.server_port}/some/net.h5",
        size=len(CONTENT),
        md5=hashlib.md5(CONTENT).hexdigest(),
    )


def names(folder):
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock")


def refusal(published, folder):
    with pytest.raises(UserError) as e:
        fetch._fetch(published, folder)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_downloads_once_into_a_new_folder(server, published, tmp_path, capfd):
    folder = tmp_path / "a" / "b"
    path = fetch._fetch(published, folder)
    assert path == folder / "net.h5" and path.read_bytes() == CONTENT
    assert names(folder) == ["net.h5"]
    assert fetch._fetch(published, folder) == path
    assert server.ranges == [None]
    assert "net.h5" in capfd.readouterr().err  # the bar
    assert fetch.sha256(path) == hashlib.sha256(CONTENT).hexdigest()


def test_resumes_after_a_cut(server, published, tmp_path):
    server.cut_at = 600_000
    message = refusal(published, tmp_path)
    assert "cut at 600,000 of 1,000,003" in message and "run again" in message
    assert names(tmp_path) == ["net.h5.part"]
    server.cut_at = None
    assert fetch._fetch(published, tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=600000-"]
    assert names(tmp_path) == ["net.h5"]


def test_begins_anew_where_the_server_knows_no_range(server, published, tmp_path):
    (tmp_path / "net.h5.part").write_bytes(CONTENT[:1000])
    server.honours_range = False
    assert fetch._fetch(published, tmp_path).read_bytes() == CONTENT
    assert server.ranges == ["bytes=1000-"]


def test_part_that_is_complete_needs_no_network(server, published, tmp_path):
    (tmp_path / "net.h5.part").write_bytes(CONTENT)
    assert fetch._fetch(published, tmp_path).read_bytes() == CONTENT
    assert server.ranges == []


@pytest.mark.parametrize(
    "content",
    [
        CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]),  # one bit
        b"<html>sign in to the network</html>",
        CONTENT + b"more",
        b"",
    ],
)
def test_wrong_content_is_deleted(server, published, tmp_path, content):
    server.content = content
    message = refusal(published, tmp_path)
    assert "other than the published file" in message and published.md5 in message
    assert names(tmp_path) == []
    server.content = CONTENT
    assert fetch._fetch(published, tmp_path).read_bytes() == CONTENT


def test_part_of_another_file_is_deleted(server, published, tmp_path):
    (tmp_path / "net.h5.part").write_bytes(b"x" * 5000)
    refusal(published, tmp_path)
    assert names(tmp_path) == []
    (tmp_path / "net.h5.part").write_bytes(b"x" * 5000)
    server.content = CONTENT[:100]  # 416
    refusal(published, tmp_path)
    assert names(tmp_path) == []


def test_wrong_file_in_the_cache_is_left_and_named(server, published, tmp_path):
    (tmp_path / "net.h5").write_bytes(CONTENT[:-1])
    message = refusal(published, tmp_path)
    assert str(tmp_path / "net.h5") in message and "delete it" in message
    assert names(tmp_path) == ["net.h5"] and server.ranges == []


@pytest.mark.parametrize("status", [403, 404, 503])
def test_server_error(server, published, tmp_path, status):
    server.status = status
    assert f"HTTP {status}" in refusal(published, tmp_path)


def test_a_redirection_is_followed_within_the_scheme_alone(server, published, tmp_path):
    port = server.server_port
    for other in (f"https://127.0.0.1:{port}/x", f"ftp://127.0.0.1:{port}/x", "file:///etc/passwd"):
        server.location = other
        with pytest.raises(UserError, match=r"cannot download net.h5 .(redirected to |HTTP 302)"):
            fetch._fetch(published, tmp_path)
    assert len(server.ranges) == 3  # nobody asked the other place
    assert {p.name for p in tmp_path.iterdir()} <= {".net.h5.lock"}
    server.location = "/elsewhere"
    assert fetch._fetch(published, tmp_path).read_bytes() == CONTENT


def test_a_server_that_stalls(server, published, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "_TIMEOUT_S", 0.2)
    server.cut_at = 300_000
    server.stall.clear()
    with pytest.raises(UserError, match=r"cut at .*timed out.*: run again"):
        fetch._fetch(published, tmp_path)
    server.stall.set()
    assert not (tmp_path / "net.h5").exists()
    assert (tmp_path / "net.h5.part").stat().st_size <= 300_000
    server.cut_at = None
    monkeypatch.setattr(fetch, "_TIMEOUT_S", 30)  # what must succeed may take its time
    assert fetch._fetch(published, tmp_path).read_bytes() == CONTENT


def test_an_endless_answer_is_read_no_further_than_the_file(server, published, tmp_path):
    server.content = CONTENT + bytes(50_000_000)
    with pytest.raises(UserError) as e:
        fetch._fetch(dataclasses.replace(published, md5="0" * 32), tmp_path)
    assert "gave something other than the published file" in str(e.value)
    assert {p.name for p in tmp_path.iterdir()} == {".net.h5.lock"}


def test_offline_says_what_to_put_where(server, published, tmp_path):
    server.server_close()
    message = refusal(published, tmp_path)
    for part in ("net.h5", published.url, "1,000,003 bytes", str(tmp_path), "none"):
        assert part in message
    assert names(tmp_path) == []


def test_who_comes_second_waits_and_takes_the_first_one_s_file(server, published, tmp_path):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        paths = list(pool.map(lambda _: fetch._fetch(published, tmp_path), range(4)))
    assert {p.read_bytes() for p in paths} == {CONTENT}
    assert server.ranges == [None]


def test_folder_that_cannot_be_made(server, published, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot write" in refusal(published, tmp_path / "file" / "cache")


def test_disk_that_is_full(server, published, tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    (tmp_path / "net.h5.part").symlink_to("/dev/full")
    assert "No space left" in refusal(published, tmp_path)
    assert not (tmp_path / "net.h5").exists()


def test_published_facts_are_those_of_keras():
    """Against the tables in the Keras that is installed."""
    from keras.src.applications import densenet, efficientnet, mobilenet_v3, resnet

    resnets = resnet.BASE_WEIGHTS_PATH + "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5"
    expected = {"resnet50": (resnets, resnet.WEIGHTS_HASHES["resnet50"][1])}
    for b in ("b0", "b1", "b2", "b3"):
        url = f"{efficientnet.BASE_WEIGHTS_PATH}efficientnet{b}_notop.h5"
        expected[f"efficientnet_{b}"] = (url, efficientnet.WEIGHTS_HASHES[b][1])
    for size in ("small", "large"):
        name = f"{size}_224_1.0_float"
        url = f"{mobilenet_v3.BASE_WEIGHT_PATH}weights_mobilenet_v3_{name}_no_top_v2.h5"
        expected[f"mobilenet_v3_{size}"] = (url, mobilenet_v3.WEIGHTS_HASHES[name][1])
    source = Path(densenet.__file__).read_text()
    [hashed] = re.findall(r'DENSENET121_WEIGHT_PATH_NO_TOP,[^)]*file_hash="(\w+)"', source)
    expected["densenet121"] = (densenet.DENSENET121_WEIGHT_PATH_NO_TOP, hashed)
    assert {model: (file.url, file.md5) for model, file in fetch.IMAGENET.items()} == expected
    assert all(file.url.startswith("https://") for file in fetch.IMAGENET.values())


def test_keras_own_copy_is_taken_if_it_is_whole(server, published, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setitem(fetch.IMAGENET, "resnet50", published)
    copy = tmp_path / "keras" / "models" / "net.h5"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(CONTENT)
    assert fetch.fetch_imagenet_weights(tmp_path / "cache") == copy
    assert server.ranges == [] and not (tmp_path / "cache").exists()
    copy.write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match="https only"):  # it would download, but not by http
        fetch.fetch_imagenet_weights(tmp_path / "cache")
    assert server.ranges == []


def test_resolve(tmp_path):
    assert fetch.resolve("none", "resnet50", tmp_path) is None
    (tmp_path / "w.h5").touch()
    assert fetch.resolve(str(tmp_path / "w.h5"), "resnet50", tmp_path) == tmp_path / "w.h5"
    with pytest.raises(UserError, match="no such file"):
        fetch.resolve(str(tmp_path / "other.h5"), "resnet50", tmp_path)
    for model in ("resnet50_v1_5", "resnet14_small"):
        with pytest.raises(UserError, match=f"none with a hash is published for {model}, only for"):
            fetch.resolve("imagenet", model, tmp_path)


def test_a_package_s_file_that_is_another_is_refused(tmp_path, monkeypatch):
    package, name, _ = fetch.INSTALLED["efficientnet_lite0"]
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"other")
    with pytest.raises(UserError, match="is not the published file .SHA-256 5793"):
        fetch.resolve("imagenet", "efficientnet_lite0", tmp_path)
    known = (package, name, hashlib.sha256(b"other").hexdigest())
    monkeypatch.setitem(fetch.INSTALLED, "efficientnet_lite0", known)
    assert fetch.resolve("imagenet", "efficientnet_lite0", tmp_path) == path
