"""A model reference leads to a directory that models may be loaded from, or nowhere, and never says where it led."""

from __future__ import annotations

import os
import re
import string
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from orcd_jax.checkpoint.model_ref import MAX_CHARS, ModelRef, parse_model_ref, resolve
from orcd_jax.errors import ErrorCode, OrcdError

CHARACTERS = string.ascii_letters + string.digits + "-_/:.@="


def refusal(call: Callable[[], object], code: ErrorCode) -> str:
    """The one error of a call, which can be shown."""
    with pytest.raises(OrcdError) as caught:
        call()
    assert caught.value.code is code
    assert caught.value.field == "model_ref"
    assert caught.value.message.startswith("model_ref: ")
    assert caught.value.message.isprintable()
    assert caught.value.message.isascii()
    assert len(caught.value.message) < 250
    return caught.value.message


# -- form --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("m", ModelRef("file", "m")),
        ("llama/3.1-8b", ModelRef("file", "llama/3.1-8b")),
        ("-", ModelRef("file", "-")),
        ("-rf/--", ModelRef("file", "-rf/--")),
        (".hidden/...", ModelRef("file", ".hidden/...")),
        ("a/b:c@d=e", ModelRef("file", "a/b:c@d=e")),
        ("file:a/b", ModelRef("file", "a/b")),
        ("file:hf:a/b", ModelRef("file", "hf:a/b")),
        ("file:/srv/models/m", ModelRef("file", "/srv/models/m")),
        ("/srv/models/m", ModelRef("file", "/srv/models/m")),
        ("hf:org/repo", ModelRef("hf", "org/repo")),
        ("hf:org/repo@rev::file=x", ModelRef("hf", "org/repo", "rev", "x")),
        ("hf:o-r.g/re_po@refs/pr/1", ModelRef("hf", "o-r.g/re_po", "refs/pr/1")),
        ("hf:org/repo::file=sub/x.gguf", ModelRef("hf", "org/repo", None, "sub/x.gguf")),
        ("x" * MAX_CHARS, ModelRef("file", "x" * MAX_CHARS)),
    ],
)
@pytest.mark.requirement("WORKER-4300")
def test_a_reference_is_a_path_or_a_repository(text: str, ref: ModelRef) -> None:
    assert parse_model_ref(text) == ref


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "0 characters; it must have 1 to 512"),
        ("x" * 513, "513 characters; it must have 1 to 512"),
        *(
            (f"a{c}b", "not all of its characters are allowed")
            for c in " \0\n\t\x1b;|&$`'\"\\<>(){}[]*?!~#%^,+\x7fé\u202e٣"
        ),
        ("m\n", "not all of its characters are allowed"),
        *(
            (text, "a part of its path is empty, . or ..")
            for text in (".", "..", "a/..", "../a", "a/./b", "a//b", "a/")
        ),
        *(
            (f"file:{text}", "a part of its path is empty, . or ..")
            for text in ("", "/", "//a", "/../a", "///", "a/../b")
        ),
        *(
            (text, "a part of its path is empty")
            for text in ("hf:../x", "hf:a/..", "hf:a/b@c/../d", "hf:a/b::file=../x")
        ),
        *(
            (text, "its scheme is not known")
            for text in ("http://a/b", "s3:a", "FILE:a", "HF:a/b", "C:a", "..:a", "m:tag")
        ),
        *(
            (f"hf:{text}", "it must be hf:org/repo")
            for text in ("", "a", "a/b/c", "a/b@", "a/b::file=", "a/b::x=y", "/a/b")
        ),
        *(
            (f"hf:{text}", "it must be hf:org/repo")
            for text in ("a/b@/c", "a/b::file=/x", "a/b@c@d", "a/b=c", "a/b::file=x@r")
        ),
    ],
)
@pytest.mark.requirement("WORKER-4300")
@pytest.mark.requirement("WORKER-4304")
def test_what_is_no_reference_is_refused_by_its_rule(text: str, rule: str) -> None:
    assert rule in refusal(lambda: parse_model_ref(text), ErrorCode.INVALID_PARAMS)


def oracle(text: str) -> bool:
    """Whether a text is a reference, said another way."""
    if not 1 <= len(text) <= 512 or set(text) - set(CHARACTERS):
        return False
    head, colon, rest = text.partition(":")
    if not colon or set(head) & set("/@=") or not head:
        head, rest = "file", text
    if head == "file":
        parts = PurePosixPath(rest).parts
        return rest == str(PurePosixPath(rest)) and ".." not in parts and rest not in (".", "/") and rest[:2] != "//"
    name, *more = rest.split("::file=") if head == "hf" else ["", "", ""]
    repository, at, revision = name.partition("@")
    pieces = [repository, *([revision] if at else []), *more]
    return (
        len(more) <= 1
        and repository.count("/") == 1
        and not any(set(piece) & set(":@=") for piece in pieces)
        and not any(part in ("", ".", "..") for piece in pieces for part in piece.split("/"))
    )


REFERENCES = st.one_of(
    st.text(),
    st.text(CHARACTERS, max_size=520),
    st.text("a./:@=", max_size=9),
    st.lists(
        st.sampled_from(["hf:", "file:", "::file=", "@", "/", "..", ".", "a", "org/repo", "x y", "\0", "é", ":", "="]),
        max_size=8,
    ).map("".join),
)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(REFERENCES)
@example("hf:org/repo@rev::file=x")
@example("file:/path")
@pytest.mark.requirement("WORKER-4300")
@pytest.mark.requirement("WORKER-4304")
def test_exactly_what_obeys_the_rules_is_a_reference_and_nothing_is_repeated(text: str) -> None:
    if oracle(text):
        assert parse_model_ref(text).path in text
        return
    message = refusal(lambda: parse_model_ref(text), ErrorCode.INVALID_PARAMS)
    # The same text for all texts that break the rule: nothing of them is in it.
    assert re.sub(r"\d+ characters", "N characters", message) in {
        "model_ref: N characters; it must have 1 to 512",
        "model_ref: not all of its characters are allowed; they may be A-Z a-z 0-9 - _ / : . @ =",
        "model_ref: a part of its path is empty, . or ..; write the path without",
        "model_ref: of Hugging Face it must be hf:org/repo, with @revision or ::file=name after it",
        "model_ref: its scheme is not known; it must be a path, file:path or hf:org/repo",
    }


# -- places ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``models/`` may be loaded from; ``secret/`` lies beside it, and ``models/`` has links of every kind."""
    world = tmp_path_factory.mktemp("world")
    for folder in ("models/llama/arrays", "models/org/phi", "more/llama", "more/extra", "secret/llama", "models-old/x"):
        (world / folder).mkdir(parents=True)
    models = world / "models"
    (models / "file").write_bytes(b"")
    for name, target in {
        "alias": "llama",
        "absolute": str(models / "llama"),
        "org/up": "../llama",
        "twice": "alias",
        "back": "../models/org",
        "out": "../secret",
        "out_absolute": str(world / "secret"),
        "out_twice": "out",
        "etc": "/etc",
        "top": "/",
        "up": "..",
        "dangling": "nowhere",
        "dangling_out": "../nowhere",
        "loop": "loop",
        "other": "../more/extra",
    }.items():
        (models / name).symlink_to(target)
    (world / "link").symlink_to("models")
    return world


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("llama", "models/llama"),
        ("file:llama", "models/llama"),
        ("llama/arrays", "models/llama/arrays"),
        ("org/phi", "models/org/phi"),
        ("alias", "models/llama"),
        ("absolute", "models/llama"),
        ("twice", "models/llama"),
        ("org/up", "models/llama"),
        ("back/phi", "models/org/phi"),
        ("alias/arrays", "models/llama/arrays"),
        ("/models", "models"),
        ("/models/llama", "models/llama"),
        ("/models/alias", "models/llama"),
        ("/link/llama", "models/llama"),
    ],
)
@pytest.mark.requirement("WORKER-4320")
@pytest.mark.requirement("WORKER-4321")
def test_a_reference_inside_leads_to_the_directory_itself(world: Path, text: str, place: str) -> None:
    text = f"file:{world}{text}" if text.startswith("/") else text
    found = resolve(parse_model_ref(text), allowed=[world / "models"])
    assert found == world / place
    assert found == found.resolve(strict=True)


OUTSIDE = [
    "out",
    "out/llama",
    "out_absolute",
    "out_twice",
    "etc",
    "top",
    "up",
    "up/secret",
    "dangling_out",
    "out/nowhere",
]
OUTSIDE += [f"top{os.sep}etc", "/secret/llama", "/nowhere", "/models-old/x", "/models/out", "/models/up/models-old"]


@pytest.mark.parametrize("text", OUTSIDE)
@pytest.mark.requirement("WORKER-4320")
@pytest.mark.requirement("WORKER-4322")
@pytest.mark.requirement("WORKER-4323")
def test_a_reference_that_leads_out_is_refused_alike_whatever_is_there(world: Path, text: str) -> None:
    """Alike, so that nobody can ask what the machine holds."""
    text = f"file:{world}{text}" if text.startswith("/") else text
    message = refusal(lambda: resolve(parse_model_ref(text), allowed=[world / "models"]), ErrorCode.POLICY_VIOLATION)
    assert message == (
        "model_ref: it must lead, links resolved, into a directory that models may be loaded from "
        "(--model_path, --model_root)"
    )


@pytest.mark.parametrize("text", ["/etc", "file:/etc/passwd", "/proc/self/root", "/nowhere/at/all"])
@pytest.mark.requirement("WORKER-4320")
def test_places_of_the_system_are_outside(world: Path, text: str) -> None:
    refusal(lambda: resolve(parse_model_ref(text), allowed=[world / "models"]), ErrorCode.POLICY_VIOLATION)


@pytest.mark.parametrize(
    "text",
    ["nowhere", "llama/nowhere", "file", "file/x", "file:loop", "loop/x", "dangling", "x" * 300, "/models/nowhere"],
)
@pytest.mark.requirement("WORKER-4323")
def test_a_reference_to_nothing_inside_is_a_model_that_is_not_there(world: Path, text: str) -> None:
    text = f"file:{world}{text}" if text.startswith("/") else text
    message = refusal(lambda: resolve(parse_model_ref(text), allowed=[world / "models"]), ErrorCode.MODEL_LOAD_FAILED)
    assert "no such directory where models may be loaded from" in message
    assert str(world) not in message


def test_a_root_may_be_the_models_own_directory(world: Path) -> None:
    model = world / "models" / "llama"
    assert resolve(parse_model_ref(str(model)), allowed=[model]) == model
    assert resolve(parse_model_ref(str(world / "models" / "alias")), allowed=[model]) == model
    refusal(lambda: resolve(parse_model_ref(str(world / "models")), allowed=[model]), ErrorCode.POLICY_VIOLATION)
    refusal(lambda: resolve(parse_model_ref("llama"), allowed=[model]), ErrorCode.MODEL_LOAD_FAILED)


def test_a_root_may_have_any_name(tmp_path: Path) -> None:
    """Whoever runs the worker chooses it; only who calls the worker is bound."""
    root = tmp_path / "modèles $(x) \u202e"
    (root / "llama").mkdir(parents=True)
    assert resolve(parse_model_ref("llama"), allowed=[root]) == root / "llama"


@pytest.mark.requirement("WORKER-4321")
def test_a_root_may_be_a_link(world: Path) -> None:
    assert resolve(parse_model_ref("llama"), allowed=[world / "link"]) == world / "models" / "llama"


def test_roots_are_searched_in_order_and_a_link_between_them_is_inside(world: Path) -> None:
    models, more = world / "models", world / "more"
    assert resolve(parse_model_ref("llama"), allowed=[models, more]) == models / "llama"
    assert resolve(parse_model_ref("llama"), allowed=[more, models]) == more / "llama"
    assert resolve(parse_model_ref("extra"), allowed=[models, more]) == more / "extra"
    assert resolve(parse_model_ref("other"), allowed=[models, more]) == more / "extra"
    refusal(lambda: resolve(parse_model_ref("other"), allowed=[models]), ErrorCode.POLICY_VIOLATION)


@pytest.mark.requirement("WORKER-4320")
def test_where_nothing_is_allowed_nothing_is_found(world: Path) -> None:
    for text in ("llama", str(world / "models" / "llama"), "nowhere"):
        refusal(lambda text=text: resolve(parse_model_ref(text), allowed=[]), ErrorCode.POLICY_VIOLATION)  # type: ignore[misc]
    missing = [world / "not_there"]
    refusal(lambda: resolve(parse_model_ref("llama"), allowed=missing), ErrorCode.MODEL_LOAD_FAILED)


def test_a_repository_is_told_to_be_converted_first(world: Path) -> None:
    ref = parse_model_ref("hf:org/phi@main")
    message = refusal(lambda: resolve(ref, allowed=[world / "models"]), ErrorCode.MODEL_LOAD_FAILED)
    assert "convert it with tools/convert_hf.py" in message


NAMES = [
    "llama",
    "arrays",
    "org",
    "phi",
    "alias",
    "absolute",
    "twice",
    "back",
    "out",
    "out_absolute",
    "etc",
    "top",
    "up",
]
NAMES += [
    "dangling",
    "dangling_out",
    "loop",
    "other",
    "file",
    "models",
    "secret",
    "..",
    ".",
    "",
    "x\0",
    "é",
    "tmp",
    "proc",
]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(["", "file:", "hf:"]),
    st.sampled_from(["", "/", "{world}/", "{world}/models/", "{world}/models/../", "{world}//models/"]),
    st.lists(st.sampled_from(NAMES), max_size=7),
)
@pytest.mark.requirement("WORKER-4320")
@pytest.mark.requirement("WORKER-4321")
@pytest.mark.requirement("WORKER-4322")
def test_nothing_outside_is_ever_found(world: Path, scheme: str, start: str, names: list[str]) -> None:
    models = world / "models"
    text = scheme + start.format(world=world) + "/".join(names)
    found, refused = None, None
    try:
        found = resolve(parse_model_ref(text), allowed=[models])
    except OrcdError as error:
        refused = error
    if found is None:
        assert refused is not None
        assert refused.code in (ErrorCode.INVALID_PARAMS, ErrorCode.POLICY_VIOLATION, ErrorCode.MODEL_LOAD_FAILED)
        assert str(world) not in refused.message
        assert refused.message.isprintable()
        return
    # By another way than names: going up from what was found, one comes to the very folder that is allowed.
    assert any(above.samefile(models) for above in (found, *found.parents))
    assert found.samefile(models / text.removeprefix("file:"))
    assert not any(above.is_symlink() for above in (found, *found.parents))
