"""The file of keys."""

from __future__ import annotations

import hashlib

import pytest

from lorica.errors import LoricaError
from lorica.serve.keys import Keys, Tenant

KEY = "sk-0123456789abcdef"


def read(tmp_path, text):
    (tmp_path / "keys.toml").write_text(text)
    return Keys.read(tmp_path / "keys.toml")


def test_a_key_or_its_digest_names_a_tenant_and_nothing_else_does(tmp_path):
    digest = hashlib.sha256(b"sk-another-long-key").hexdigest().upper()
    keys = read(
        tmp_path,
        f"""
        [support]
        key = "{KEY}"
        models = ["support-*", "base"]
        concurrency = 4
        rate = 2.5
        [ops]
        key_sha256 = "{digest}"
        admin = true
        """,
    )
    assert keys.tenant(KEY) == Tenant("support", ("support-*", "base"), False, 4, 2.5)
    assert keys.tenant("sk-another-long-key") == Tenant("ops", ("*",), True)
    assert keys.tenant(KEY + "x") is keys.tenant("") is keys.tenant("schlüssel") is None


def test_a_tenant_may_use_what_its_globs_say():
    tenant = Tenant("t", ("support-*", "base"))
    assert tenant.may_use("support-de") and tenant.may_use("base")
    assert not tenant.may_use("sales") and not tenant.may_use("Support-de")


def test_every_fault_of_the_file_is_told_at_once(tmp_path):
    with pytest.raises(LoricaError) as told:
        read(
            tmp_path,
            f"""
            x = 1
            [a]
            key = "short"
            [b]
            key = "{KEY}"
            key_sha256 = "{"0" * 64}"
            [c]
            key_sha256 = "no digest"
            model = ["x"]
            [d]
            key = "{KEY}"
            models = "x"
            admin = "yes"
            concurrency = 0.5
            rate = 0
            [e]
            key = "{KEY}"
            [f]
            key = "{KEY}"
            [g]
            key_sha256 = {"1" * 64}
            rate = nan
            """,
        )
    assert str(told.value).splitlines()[1:] == [
        "  [x] must be a table",
        "  [a] key must be text of at least 16 characters",
        "  [b] needs one of key and key_sha256",
        "  [c] unknown 'model'; did you mean 'models'?",
        "  [c] key_sha256 must be 64 hex digits",
        "  [d] models must be a list of names or globs",
        "  [d] admin must be true or false",
        "  [d] concurrency must be a whole number above 0",
        "  [d] rate must be a number above 0",
        "  [f] the same key as [e]",
        "  [g] key_sha256 must be 64 hex digits",
        "  [g] rate must be a number above 0",
    ]


@pytest.mark.parametrize("text", ["", "not = [toml"])
def test_a_file_without_keys_is_refused(tmp_path, text):
    with pytest.raises(LoricaError, match="no tenant|not TOML"):
        read(tmp_path, text)
    with pytest.raises(LoricaError, match="No such file"):
        Keys.read(tmp_path / "none.toml")
