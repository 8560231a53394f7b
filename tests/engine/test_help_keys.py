from __future__ import annotations

from fvcore.common.config import CfgNode

from pcka.engine.help_keys import Key, commented_keys, shown


def tree():
    cfg = CfgNode({"ONE": 1})  # of all
    cfg.SECTION = CfgNode(
        {
            "TWO": 2,  # the second: a "#" is kept
            "INNER": {"THREE": [3]},  # the third
            "NONE": 0,
        }
    )
    cfg.SECTION.FOUR = "four"  # the fourth
    return cfg


def test_each_key_has_the_comment_of_its_line():
    assert commented_keys(tree) == {
        "ONE": "of all",
        "SECTION.TWO": 'the second: a "#" is kept',
        "SECTION.INNER.THREE": "the third",
        "SECTION.NONE": "",
        "SECTION.FOUR": "the fourth",
    }


def test_long_texts_go_on_below_themselves():
    first, second = shown(Key("A.B", "", "word " * 20)).splitlines()
    assert first.startswith("  A.B '' ") and len(first) <= 100
    assert second.startswith(" " * 47 + "word")
