"""The store: leases, bytes, reloads, aliases, and what must not be read."""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from lorica.errors import LoricaError
from lorica.serve.leases import Unknown
from lorica.serve.places import CONFIG, TENSORS
from lorica.serve.store import Store

SIZE = 100


@dataclass
class Read:
    """A payload that remembers what it was read from."""

    text: str
    nbytes: int = SIZE
    rank: int = 8


def read(folder: Path) -> Read:
    text = (folder / TENSORS).read_text().strip()
    if text == "bad":
        raise LoricaError("it is bad")
    return Read(text)


def put(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in ((CONFIG, json.dumps({"text": text})), (TENSORS, text.ljust(SIZE))):
        (folder / f".{name}").write_text(content)
        os.replace(folder / f".{name}", folder / name)
    return folder


@pytest.fixture
def root(tmp_path):
    for name in "abcd":
        put(tmp_path / "root" / name, f"{name}1")
    return tmp_path / "root"


@pytest.fixture
def make(root):
    made = []

    def build(*args, every=0.02, **kwargs):
        made.append(Store(*(args or (read, root)), every=every, **kwargs))
        return made[-1]

    yield build
    for store in made:
        store.close()


def text(lease) -> str:
    assert lease.wait(5)
    assert lease.generation.payload, lease.generation.error
    return lease.generation.payload.text


def state(store, name) -> str:
    return next(status.state for status in store.status() if status.name == name)


def eventually(condition) -> bool:
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_a_lease_never_waits_and_calls_back_once_the_files_are_read(make, root):
    go, done = threading.Event(), []
    store = make(lambda folder: (go.wait(5), read(folder))[1], root)
    lease = store.lease("a")
    assert state(store, "a") == "loading" and not lease.generation.done
    lease.when_done(lambda: done.append(lease.generation.payload))
    go.set()
    assert text(lease) == "a1"
    assert eventually(lambda: len(done) == 1)
    lease.when_done(lambda: done.append("now"))
    assert done[1] == "now"
    lease.release()
    assert state(store, "a") == "resident"


def test_two_leases_share_one_load(make):
    store = make()
    first, second = store.lease("a"), store.lease("a")
    assert text(first) == text(second) and first.generation is second.generation
    assert store.loads == 1


def test_the_least_recently_used_goes_when_bytes_run_out_but_never_a_leased_or_pinned_one(make):
    store = make(limit=2 * SIZE)
    with store.lease("a") as lease:
        text(lease)
    store.pin("b")
    assert eventually(lambda: state(store, "b") == "pinned")
    with store.lease("a") as held, store.lease("c") as waits:
        text(held)
        assert not waits.wait(0.1)  # a is leased, b pinned: there is no room
        assert store.nbytes == 2 * SIZE
        held.release()
        assert text(waits) == "c1"
    assert [state(store, name) for name in "abc"] == ["on disk", "pinned", "resident"]
    assert store.nbytes == 2 * SIZE and store.evictions == 1


def test_what_can_never_fit_says_so(make):
    store = make(limit=SIZE - 1)
    lease = store.lease("a")
    assert lease.wait(5)
    assert "more than" in lease.generation.error
    assert store.nbytes == 0


def test_changed_files_are_a_new_generation_and_running_requests_keep_the_old(make, root):
    store = make()
    old = store.lease("a")
    assert text(old) == "a1"
    put(root / "a", "a2")
    assert eventually(lambda: store.loads == 2)
    new = store.lease("a")
    assert (text(old), text(new)) == ("a1", "a2")
    assert old.generation.digest != new.generation.digest
    assert store.nbytes == 2 * SIZE
    old.release()
    assert store.nbytes == SIZE and old.generation.payload is None
    old.release()
    assert new.generation.leases == 1


def test_a_reload_that_fails_leaves_the_old_generation_serving(make, root):
    store = make()
    with store.lease("a") as lease:
        text(lease)
    put(root / "a", "bad")
    assert eventually(lambda: any(status.error for status in store.status()))
    assert text(store.lease("a")) == "a1"
    put(root / "a", "a3")
    assert eventually(lambda: text(store.lease("a")) == "a3")


def test_a_broken_adapter_fails_its_own_leases_and_is_read_again_once_mended(make, root):
    put(root / "bad", "bad")
    store = make()
    lease = store.lease("bad")
    assert lease.wait(5) and lease.generation.error == "it is bad"
    assert state(store, "bad") == "failed"
    with pytest.raises(LoricaError, match="it is bad"):
        store.lease("bad")
    put(root / "bad", "good")
    assert text(store.lease("bad")) == "good"


def test_unload_gives_no_new_leases_and_frees_when_the_last_is_released(make):
    store = make()
    lease = store.lease("a")
    text(lease)
    store.unload("a")
    assert state(store, "a") == "unloaded" and store.nbytes == SIZE
    with pytest.raises(Unknown, match="unloaded"):
        store.lease("a")
    assert text(lease) == "a1"
    lease.release()
    assert store.nbytes == 0
    assert text(store.load("a")) == "a1"


def test_an_alias_switches_to_a_generation_and_back(make, root):
    store = make()
    store.alias("prod", "a")
    with store.lease("prod") as lease:
        assert text(lease) == "a1" and lease.name == "a"
        first = lease.generation.digest
    assert store.alias("prod", f"a@{first[:10]}") == "a"
    put(root / "a", "a2")
    assert eventually(lambda: store.loads == 2)
    assert text(store.lease("a")) == "a2"
    assert text(store.lease("prod")) == "a1"  # the fixed generation stays in memory
    assert store.find("prod").digest == first != store.find("a").digest
    before = store.alias("prod", "a")
    assert before == f"a@{first}"
    assert text(store.lease("prod")) == "a2"
    with pytest.raises(LoricaError, match="own name"):
        store.alias("b", "a")
    store.unalias("prod")
    with pytest.raises(Unknown):
        store.lease("prod")


def test_a_generation_that_an_alias_keeps_outlives_its_files(make, root):
    store = make()
    first = store.lease("a")
    assert text(first) == "a1"
    store.alias("prod", f"a@{first.generation.digest}")
    first.release()
    for name in (CONFIG, TENSORS):
        (root / "a" / name).unlink()
    assert eventually(lambda: "a" not in [status.name for status in store.status()])
    assert store.find("prod").state == "pinned"
    assert text(store.lease("prod")) == "a1"


def test_a_name_keeps_its_files_where_others_that_it_was_to_have_cannot_be_loaded(make, root):
    store = make(limit=2 * SIZE)
    assert text(store.load("mine", root / "a")) == "a1"
    with store.load("mine", put(root / "d", "bad")) as lease:
        assert lease.wait(5) and lease.generation.error
    with store.lease("mine") as lease:
        assert text(lease) == "a1"
    store.unload("mine")  # out of memory, so that it has to be read again
    with store.load("mine") as lease:
        assert text(lease) == "a1"


def test_who_waited_for_a_load_and_fails_does_not_stop_the_next_load(make):
    store = make()
    store.lease("a").when_done(lambda: 1 / 0)
    assert text(store.lease("a")) == "a1" and text(store.lease("b")) == "b1"


def test_what_was_loaded_ahead_is_not_the_first_to_go(make):
    store = make(limit=2 * SIZE)
    for name in "ab":
        with store.lease(name) as lease:
            assert text(lease)
    store.prefetch("c")
    assert eventually(lambda: state(store, "c") == "resident")
    with store.lease("d") as lease:
        assert text(lease) == "d1"
    assert state(store, "c") == "resident" and state(store, "b") == "on disk"


def test_names_come_and_go_with_the_folder(make, root):
    store = make()
    with pytest.raises(Unknown, match="did you mean"):
        store.lease("aa")
    put(root / "later", "l1")
    assert text(store.lease("later")) == "l1"  # found at once, before the next look
    for name in (CONFIG, TENSORS):
        (root / "later" / name).unlink()
    assert eventually(lambda: "later" not in [status.name for status in store.status()])


@pytest.mark.parametrize(
    "name", ["../a", "a/../../b", "/etc", "", ".", "..", "a b", "a\n", "x/y/z", "-a", "a/../b", "a\0"]
)
def test_names_that_could_be_paths_are_refused(make, root, name):
    put(root.parent / "b", "outside")
    store = make()
    with pytest.raises(LoricaError):
        store.lease(name)
    with pytest.raises(LoricaError):
        store.load(name, root / "a")


def test_nothing_outside_the_root_is_read_by_request(make, root):
    outside = put(root.parent / "outside", "secret")
    (root / "link").symlink_to(outside)
    (root / "files").mkdir()
    (root / "loop").symlink_to(root / "loop")
    for name in (CONFIG, TENSORS):
        (root / "files" / name).symlink_to(outside / name)
    store = make(named={"ours": outside})
    for name in ("link", "files", "loop"):
        with pytest.raises(LoricaError):
            store.lease(name)
        with pytest.raises(LoricaError):
            store.load("new", root / name)
    for place in (outside, root / ".." / "outside", "acme/sql"):
        with pytest.raises(LoricaError):
            store.load("new", place)
    assert text(store.lease("ours")) == "secret"  # the operator named it
    # A folder that becomes a link after it was seen is looked at again before it is read.
    (root / "d" / TENSORS).unlink()
    (root / "d" / TENSORS).symlink_to(outside / TENSORS)
    lease = store.lease("d")
    assert lease.wait(5) and lease.generation.payload is None


def test_hub_ids_come_from_the_allow_list_only(make, root, monkeypatch, tmp_path):
    import huggingface_hub

    asked = []
    fetched = put(tmp_path / "hub", "from the hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda id, **_: asked.append(id) or str(fetched))
    store = make(hub=["acme/*"])
    assert text(store.load("sql", "acme/sql")) == "from the hub"
    with pytest.raises(LoricaError, match="may fetch"):
        store.load("other", "evil/sql")
    with pytest.raises(LoricaError, match="may fetch"):
        store.load("other", "acme/../../x")
    assert asked == ["acme/sql"]


def test_a_hub_that_failed_is_asked_again_only_after_a_while(make, root, monkeypatch, tmp_path):
    import huggingface_hub

    from lorica.serve import names

    fetched, asked = put(tmp_path / "hub", "from the hub"), []

    def download(id, **_):
        asked.append(id)
        if len(asked) == 1:
            raise OSError("no network")
        return str(fetched)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    store = make(read, root, {"far": "acme/far"}, hub=["acme/*"])
    with store.lease("far") as lease:
        assert lease.wait(5) and "no network" in lease.generation.error
    with pytest.raises(LoricaError, match="no network"):
        store.lease("far")
    monkeypatch.setattr(names, "_AGAIN", 0.0)
    assert text(store.lease("far")) == "from the hub"
    assert asked == ["acme/far"] * 2


def test_the_base_models_name_is_taken(make, root):
    put(root / "base", "x")
    store = make(reserved=["base"])
    assert "base" not in [status.name for status in store.status()]
    with pytest.raises(LoricaError):
        store.load("base", root / "a")
    with pytest.raises(LoricaError):
        store.alias("base", "a")


def test_many_threads_lease_release_reload_and_evict_without_losing_count(make, root):
    store = make(limit=3 * SIZE)
    faults = []

    def work(seed: int) -> None:
        for step in range(40):
            name = "abcd"[(seed + step) % 4]
            lease = store.lease(name)
            if not lease.wait(10) or not text(lease).startswith(name):
                faults.append(name)
            if step % 9 == seed:
                store.load(name).release()
            lease.release()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not faults and not any(thread.is_alive() for thread in threads)
    assert eventually(lambda: all(status.state != "loading" for status in store.status()))
    assert all(status.leases == 0 for status in store.status())
    assert store.nbytes == sum(status.nbytes for status in store.status()) <= 3 * SIZE


def test_what_does_not_fit_beside_the_pinned_says_so_and_others_are_still_loaded(make, root):
    store = make(limit=2 * SIZE + SIZE // 2)
    store.pin("a")
    store.pin("b")
    assert eventually(lambda: state(store, "a") == state(store, "b") == "pinned")
    lease = store.lease("c")
    assert lease.wait(5)
    assert "do not fit beside the 200 that are pinned" in lease.generation.error
    lease.release()
    store.unload("a")
    assert eventually(lambda: state(store, "a") == "unloaded")
    put(root / "c", "c2")
    again = store.lease("c")
    assert text(again) == "c2"


def test_a_name_that_is_given_another_folder_while_it_loads_is_of_that_folder(root):
    slow, going = threading.Event(), threading.Event()

    def reads(folder):
        if folder.name == "a":
            going.set()
            slow.wait(5)
        return read(folder)

    store = Store(reads, root, every=0.02)
    try:
        first = store.load("x", root / "a")
        assert going.wait(5)
        second = store.load("x", root / "b")
        slow.set()
        assert text(second) == "b1"
        assert first.wait(5)
        third = store.lease("x")
        assert text(third) == "b1"
    finally:
        slow.set()
        store.close()
