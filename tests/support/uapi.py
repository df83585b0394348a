"""Reads Linux's UAPI headers, so that our constants and layouts are compared with facts that we did not write.

Understands what those headers use: ``#define``s and enums of integer expressions, and structs of fixed-width fields,
arrays, nested and anonymous structs and unions, with the natural alignment of C on 64-bit machines.
"""

import os
import re
from functools import cache
from pathlib import Path

from vfiouser_virtio.vm.debian import fetch

_SCALARS = {
    "__u8": 1, "__s8": 1, "u8": 1, "uint8_t": 1, "char": 1, "__u16": 2, "__s16": 2, "__le16": 2, "__be16": 2,
    "__virtio16": 2, "u16": 2, "uint16_t": 2, "__u32": 4, "__s32": 4, "__le32": 4, "__be32": 4, "__virtio32": 4,
    "u32": 4, "uint32_t": 4, "int": 4, "__u64": 8, "__s64": 8, "__le64": 8, "__be64": 8, "__virtio64": 8, "u64": 8,
    "uint64_t": 8, "__aligned_u64": 8,
}  # fmt: skip

_FOREIGN = {"ETH_ALEN": 6}  # used in a header without having been defined there

Layout = dict[str, tuple[int, int]]


@cache
def uapi_include() -> Path:
    """The folder that holds ``linux/vfio.h``: /usr/include, what UAPI_INCLUDE says, or a fetched one."""
    include = Path(os.environ.get("UAPI_INCLUDE", "/usr/include"))
    if "UAPI_INCLUDE" not in os.environ and not (include / "linux" / "vfio.h").exists():
        include = fetch("linux-headers", ["linux-libc-dev"], what="Linux's headers", megabytes=2) / "usr" / "include"
    assert (include / "linux").is_dir(), f"no Linux headers in {include}, which UAPI_INCLUDE names"
    return include


@cache
def source(path: str | Path) -> str:
    """The text of a header, named from the include folder or in full, without comments and line continuations."""
    text = (uapi_include() / path).read_text()
    text = re.sub(r"/\*.*?\*/|//[^\n]*", " ", text, flags=re.DOTALL)
    return text.replace("\\\n", " ")


@cache
def defines(path: str | Path) -> dict[str, int]:
    """Every constant of a header whose value is an integer: object-like ``#define``s and enumerators."""
    text = source(path)
    found: dict[str, int] = {}
    for name, expression in re.findall(r"^[ \t]*#[ \t]*define[ \t]+(\w+)[ \t]+([^\n]+)$", text, flags=re.MULTILINE):
        value = _evaluate(expression, found)
        if value is not None:
            found[name] = value
    for body in re.findall(r"\benum\b[^{;]*\{(.*?)\}", text, flags=re.DOTALL):
        following = 0
        for enumerator in re.sub(r"^[ \t]*#.*$", "", body, flags=re.MULTILINE).split(","):
            name, _, expression = (part.strip() for part in enumerator.partition("="))
            if not name.isidentifier():
                continue
            value = _evaluate(expression, found) if expression else following
            if value is not None:
                found[name] = value
                following = value + 1
    return found


def _evaluate(expression: str, known: dict[str, int]) -> int | None:
    """The value of a C integer expression, or None where it is something else."""
    expression = re.sub(r"\b_?(?:BITUL|BITULL|_BITUL|_BITULL|BIT)\(", "1<<(", expression)
    expression = re.sub(r"\b_(?:UL|ULL|AC)\((\w+)[^)]*\)", r"\1", expression)
    expression = re.sub(r"\b(0[xX][0-9a-fA-F]+|\d+)[uUlL]+\b", r"\1", expression)
    expression = re.sub(r"'(.)'", lambda match: str(ord(match[1])), expression)
    expression = re.sub(r"\b0+(\d+)\b", r"0o\1", expression)
    names = set(re.findall(r"\b[A-Za-z_]\w*", re.sub(r"\b0[xo][0-9a-fA-F]+", "", expression)))
    if not names <= known.keys() or not re.fullmatch(r"[\w\s()<>|&~+*/-]+", expression):
        return None
    try:
        value = eval(expression.replace("/", "//"), {"__builtins__": {}}, dict(known))
    except (SyntaxError, TypeError):
        return None
    return value if isinstance(value, int) else None


@cache
def _structs(path: str | Path) -> dict[str, str]:
    """The body of every named struct and union at the top level of a header, with its attributes behind it."""
    text = re.sub(r"^[ \t]*#.*$", "", source(path), flags=re.MULTILINE)
    found = {}
    for match in re.finditer(r"\b(struct|union)\s+(\w+)\s*\{", text):
        end = _closing(text, match.end() - 1)
        found[match[2]] = f"{match[1]} {{{text[match.end() : end]}}} {text[end + 1 : text.find(';', end)]}"
    return found


def _closing(text: str, opening: int) -> int:
    depth = 0
    for position in range(opening, len(text)):
        depth += (text[position] == "{") - (text[position] == "}")
        if depth == 0:
            return position
    raise AssertionError("unbalanced braces")


def struct_layout(path: str | Path, name: str) -> Layout:
    """``{field: (offset, size)}`` of a struct.

    Fields of a nested struct are ``outer_inner``, those of an anonymous one ``inner``. An array is one field; a
    flexible one has size 0.
    """
    fields, _size, _align = _layout(path, _structs(path)[name])
    return fields


def struct_size(path: str | Path, name: str) -> int:
    """``sizeof(struct name)``."""
    return _layout(path, _structs(path)[name])[1]


def _layout(path: str | Path, text: str) -> tuple[Layout, int, int]:
    """Fields, size and alignment of ``struct { ... } attributes``."""
    kind, body_start = text.split(None, 1)[0], text.index("{")
    body_end = _closing(text, body_start)
    packed = "packed" in text[body_end:]
    fields: Layout = {}
    end, position, alignment = 0, 0, 1
    for declaration in _declarations(text[body_start + 1 : body_end]):
        inner, base, align, names = _declaration(path, declaration)
        if packed:
            align = 1
        alignment = max(alignment, align)
        for name, count in names:
            start = 0 if kind == "union" else -(-position // align) * align
            if name:
                prefix = f"{name}_"
                fields[name] = (start, base * count)
            else:
                prefix = ""
            fields |= {prefix + field: (start + offset, size) for field, (offset, size) in inner.items()}
            position = start + base * count
            end = max(end, position)
    return fields, -(-end // alignment) * alignment, alignment


def _declarations(body: str) -> list[str]:
    """The member declarations of a struct body, nested braces kept whole."""
    found, start, depth = [], 0, 0
    for position, character in enumerate(body):
        depth += (character == "{") - (character == "}")
        if character == ";" and depth == 0:
            found.append(body[start:position].strip())
            start = position + 1
    return [declaration for declaration in found if declaration]


def _declaration(path: str | Path, text: str) -> tuple[Layout, int, int, list[tuple[str, int]]]:
    """Inner fields, size and alignment of one element, and the declared (name, number of elements)s."""
    flexible = re.fullmatch(r"__DECLARE_FLEX_ARRAY\(\s*(.+?)\s*,\s*(\w+)\s*\)", text)
    if flexible:
        text = f"{flexible[1]} {flexible[2]}[]"
    aligned = re.search(r"__attribute__\s*\(\(\s*aligned\s*\((\d+)\)\s*\)\)", text)
    text = re.sub(r"__attribute__\s*\(\(.*?\)\)\)?", "", text)
    inner: Layout = {}
    align = 0
    if "{" in text:
        closing = _closing(text, text.index("{"))
        inner, size, align = _layout(path, text[: closing + 1])
        declarators = text[closing + 1 :]
    elif match := re.match(r"(?:struct|union)\s+(\w+)\s*(?!\s*\*)", text):
        inner, size, align = _layout(path, _structs(path)[match[1]])
        declarators = text[match.end() :]
    else:
        match = re.match(r"(?:const\s+|unsigned\s+|enum\s+\w+\s+)*(\w+)?\s*", text)
        assert match is not None
        if text.startswith("enum"):
            size, declarators = 4, re.sub(r"^enum\s+\w+", "", text)
        else:
            declarators = text[match.end() :]
            typedef = re.search(rf"\btypedef\s+struct\s+(\w+)[^;{{]*\b{match[1]}\s*;", source(path))
            if typedef:
                inner, size, align = _layout(path, _structs(path)[typedef[1]])
            else:
                size = _SCALARS[str(match[1])]
        align = align or size
    if aligned:
        align = max(align, int(aligned[1]))
    names = []
    for declarator in declarators.split(",") if declarators.strip() else [""]:
        if declarator.strip().startswith("*"):
            size = align = 8
            inner = {}
        found = re.fullmatch(r"\**\s*(\w*)\s*((?:\[[^\]]*\]\s*)*)", declarator.strip())
        assert found is not None, f"cannot read {text!r}"
        count = 1
        for length in re.findall(r"\[([^\]]*)\]", found[2]):
            value = _evaluate(length, _FOREIGN | defines(path)) if length.strip() else 0
            assert value is not None, f"cannot evaluate {length!r}"
            count *= value
        names.append((found[1], count))
    return inner, size, align, names
