"""Which characters rhyme: the thirteen tracks of modern Mandarin, from the readings in the package `pypinyin` (MIT).

Classical poets rhymed by the sounds of their own time. Their rhyme books are not in any package index; the readings of today
are an approximation that is public, complete and the same everywhere. It is coarse on purpose: thirteen groups of finals, no
tones, and a character with several readings belongs to the groups of all of them.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module

from ernie45.errors import NotFoundError

TRACKS = {
    "a": ("a", "ia", "ua"),
    "o": ("o", "e", "uo"),
    "ie": ("ie", "ve", "ue", "ê"),
    "u": ("u",),
    "i": ("i", "v", "er"),
    "ai": ("ai", "uai"),
    "ei": ("ei", "uei", "ui"),
    "ao": ("ao", "iao"),
    "ou": ("ou", "iou", "iu"),
    "an": ("an", "ian", "uan", "van"),
    "en": ("en", "in", "uen", "un", "vn"),
    "ang": ("ang", "iang", "uang"),
    "eng": ("eng", "ing", "ueng", "ong", "iong"),
}
"""Finals that rhyme, in pypinyin's spelling (v for ü)."""

_TRACK_OF = {final: track for track, finals in TRACKS.items() for final in finals}


@cache
def tracks_of(character: str) -> frozenset[str]:
    """The tracks of a character's readings, empty for what has none. Raises: NotFoundError without pypinyin."""
    try:
        pypinyin = import_module("pypinyin")
    except ImportError as error:
        raise NotFoundError("rhymes need pypinyin: pip install pypinyin") from error
    readings = pypinyin.pinyin(character, style=pypinyin.Style.FINALS, heteronym=True, errors="ignore")
    return frozenset(_TRACK_OF[final] for found in readings for final in found if final in _TRACK_OF)


def rhyme_together(characters: list[str]) -> int:
    """How many different ones of `characters` share the track that most of them share."""
    tracks = {track for character in characters for track in tracks_of(character)}
    return max((len({c for c in characters if track in tracks_of(c)}) for track in tracks), default=0)
