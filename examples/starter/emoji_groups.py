"""Which emoji are variants of one another, so that a split can keep them together."""

from __future__ import annotations

import re
from collections.abc import Hashable

import numpy as np

Member = tuple[str, np.ndarray]

# Zero-width-joined suffixes that only vary a base emoji: gender signs, hair, facing right.
_SUFFIX = re.compile(r"-200D-(2640|2642|27A1|1F9B[0-3])(?=-|$)")
_SKIN_TONE_OR_STYLE = re.compile(r"-?\b(1F3F[B-F]|FE0F)\b")
_SAME = {
    "1F468": "1F9D1", "1F469": "1F9D1",  # man, woman -> person
    "1F466": "1F9D2", "1F467": "1F9D2",  # boy, girl -> child
    "1F474": "1F9D3", "1F475": "1F9D3",  # old man, old woman -> old person
    "1F478": "1F934",  # princess -> prince
    "1F385": "1F384C", "1F936": "1F384C",  # Father, Mother Christmas
    "1F57A": "1F483",  # dancing man -> dancing woman
    "1FAC3": "1F930", "1FAC4": "1F930",  # pregnant
    "1F46C": "1F46B", "1F46D": "1F46B",  # pairs holding hands
}  # fmt: skip
_WHOLE = {
    "1F9D1-200D-1F384": "1F384C",  # Mx Claus
    "1F9D1-200D-1F91D-200D-1F9D1": "1F46B",  # people holding hands
    "1F9D1-200D-2764-200D-1F9D1": "1F491",  # couple with heart
    "1F9D1-200D-2764-200D-1F48B-200D-1F9D1": "1F48F",  # kiss
}


def group_key(unified: str, subcategory: str) -> str:
    """Return one key for all variants of an emoji.

    ``unified`` is the code point sequence of the base entry, such as ``1F3C3-200D-2640-FE0F``.
    All families form one group, and so do the 24 clock faces.
    """
    if subcategory == "family":
        return "family"
    codes = _SKIN_TONE_OR_STYLE.sub("", unified)
    codes = _SUFFIX.sub("", codes)
    codes = "-".join(_SAME.get(code, code) for code in codes.split("-"))
    if re.fullmatch(r"1F5[56][0-9A-F]", codes) and 0x1F550 <= int(codes, 16) <= 0x1F567:
        return "clock"
    return _WHOLE.get(codes, codes)


def merge_groups(groups: dict[str, list[Member]]) -> list[list[Member]]:
    """Join groups that share an equal picture in one category (some flags are the same flag)."""
    parent: dict[Hashable, Hashable] = {key: key for key in groups}

    def root(key: Hashable) -> Hashable:
        while parent[key] != key:
            key = parent[key]
        return key

    owner: dict[bytes, str] = {}
    for key, members in groups.items():
        for _, image in members:
            first = owner.setdefault(image.tobytes(), key)
            parent[root(key)] = root(first)
    merged: dict[Hashable, list[Member]] = {}
    for key, members in groups.items():
        merged.setdefault(root(key), []).extend(members)
    return list(merged.values())
