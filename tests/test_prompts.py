"Class names keep their tokens and long prompts keep their classes, whatever the names."
import json, random, string
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer
from segsyn.files import SegsynError
from segsyn.prompts import (PROMPT_STYLES, build_prompt, class_frequency, class_prompt, find_classes, find_mentions, plural_forms, simple_prompt,
                            token_spans, top_k_prompts)

WORDS = ["car", "carpet", "pet", "hot", "dog", "hot dog", "tv", "tv monitor", "tv/monitor", "monitor", "potted plant", "plant", "traffic light", "light",
         "bird", "birds", "fire hydrant", "aeroplane", "plane", "surfboard", "board", "teddy bear", "bear", "café", "t-shirt", "o'clock", "7up", "日本"]


def tiny_tokenizer(merges: int, length: int = 77) -> CLIPTokenizer:
    "CLIP's layout with few merges, so that most words are several tokens."
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.train_from_iterator([" ".join(w for w in WORDS if w.isascii())] * 3, trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False))
    merged = [tuple(pair) for pair in json.loads(model.to_str())["model"]["merges"]][:merges]
    tokens = dict.fromkeys([*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merged), "<|startoftext|>", "<|endoftext|>"])
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merged, model_max_length=length)


def random_names(draw: random.Random) -> list[str]:
    "Made-up names among real ones: several words, parts of each other, plurals."
    def word(): return "".join(draw.choices(string.ascii_lowercase, k=draw.randint(1, 9)))
    names = draw.sample(WORDS, draw.randint(0, 4)) + [" ".join(word() for _ in range(draw.randint(1, 3))) for _ in range(draw.randint(1, 4))]
    names += [plural_forms(draw.choice(names))[0], draw.choice(names).split(" ")[0], draw.choice(names) + word()]
    draw.shuffle(names)
    return list(dict.fromkeys(names))


@pytest.mark.parametrize("merges", [0, 20, 60])
def test_spans_are_the_names(merges):
    tokenizer, several = tiny_tokenizer(merges, length=10_000), 0
    for seed in range(150):
        names = random_names(random.Random(seed))
        ids, spans = token_spans(tokenizer, names)
        assert ids == tokenizer(class_prompt(names)).input_ids and ids[0] == tokenizer.bos_token_id
        assert [ids[a:b] for a, b in spans] == [tokenizer(name, add_special_tokens=False).input_ids for name in names]
        # the spans tile everything between the begin and the end token, in order, without gap or overlap
        assert [a for a, _ in spans] + [len(ids) - 1] == [1] + [b for _, b in spans]
        several += sum(b - a > 1 for a, b in spans)
    assert several > 300


def test_spans_are_refused_where_they_cannot_be_known():
    with pytest.raises(SegsynError, match="do not fit"): token_spans(tiny_tokenizer(0, length=8), ["surfboard"])
    with pytest.raises(SegsynError): token_spans(tiny_tokenizer(0), [])

    class Gluing:
        bos_token_id, model_max_length = 0, 77
        def __call__(self, text, add_special_tokens=True, verbose=False):
            ids = [ord(c) for c in text] # blanks are tokens of their own here
            return type("Encoding", (), {"input_ids": [0] + ids + [1] if add_special_tokens else ids})()
    with pytest.raises(SegsynError, match="joins"): token_spans(Gluing(), ["car", "pet"])


@pytest.mark.parametrize("style", PROMPT_STYLES)
def test_long_prompts_lose_caption_words_only(style):
    tokenizer, cut = tiny_tokenizer(60, length=48), 0
    for seed in range(120):
        draw = random.Random(seed)
        classes = draw.sample(["car", "hot dog", "bird", "plant", "traffic light", "tv"], 2)
        words = draw.choices(["a", "very", "large", "carpet", "beside", "old", *classes, *(plural_forms(c)[0] for c in classes)], k=draw.randint(1, 30))
        caption = " ".join(words)
        prompt, full = build_prompt(caption, classes, style, tokenizer), build_prompt(caption, classes, style)
        assert len(tokenizer(prompt.text).input_ids) <= 48
        assert prompt.classes == full.classes and prompt.class_prompt == full.class_prompt == " ".join(full.classes)
        if "labels" in style: assert prompt.text.endswith(prompt.class_prompt)
        assert set(find_classes(prompt.text, classes)) >= set(prompt.classes)
        if not prompt.dropped: assert prompt.text == full.text
        else:
            cut += 1
            kept = prompt.text.split("; ")[0].split() + prompt.dropped.split()
            assert sorted(kept) == sorted(full.text.split("; ")[0].split())
            # no more than needed: one more word and it would be too long
            if style == "caption+labels":
                head, tail = prompt.text.split("; ")
                assert len(tokenizer(f"{head} {prompt.dropped.split()[0]}; {tail}").input_ids) > 48
    assert cut > 20 or style in ("simple", "labels", "simple+labels")


def test_both_tokenizers_of_a_pair_count():
    wide, narrow = tiny_tokenizer(60, 77), tiny_tokenizer(0, 30)
    prompt = build_prompt("a very large carpet beside an old car", ["car"], tokenizer=[wide, narrow])
    assert prompt.dropped and len(narrow(prompt.text).input_ids) <= 30


def test_class_words_that_do_not_fit_are_an_error():
    for style in PROMPT_STYLES:
        with pytest.raises(SegsynError, match="do not fit"):
            build_prompt("a surfboard and an aeroplane", ["surfboard", "aeroplane"], style, tiny_tokenizer(0, length=16))


def test_whole_words_only_and_longest_first():
    assert find_classes("a carpet and a scar", ["car"]) == ()
    assert find_classes("cars, carpets", ["carpet", "car"]) == ("car", "carpet")
    assert find_classes("HOT-DOGS and dogs", ["dog", "hot dog"]) == ("hot dog", "dog")
    assert find_classes("two potted plants", ["plant", "potted plant"]) == ("potted plant",)
    assert find_classes("b c d then a b c", ["a b", "b c d"]) == ("b c d", "a b")
    assert find_classes("glasses", ["glass", "glasses"]) == ("glasses",)
    assert find_classes("two people and mice on a tv/monitor", ["tv/monitor", "person", "mouse"]) == ("person", "mouse", "tv/monitor")
    assert find_classes("birds", ["bird"], plurals=False) == ()
    mentions = find_mentions("car carpet cars car", ["car", "carpet"])
    assert [name for *_, name in mentions] == ["car", "carpet", "car", "car"]


@pytest.mark.parametrize("name", [w for w in WORDS if w.isascii()])
def test_every_plural_is_found(name):
    for form in plural_forms(name): assert find_classes(f"three {form}.", [name]) == (name,)


def test_bad_input_is_refused_by_name():
    for bad in ("", "   ", None, 7):
        with pytest.raises(SegsynError, match="empty prompt"): build_prompt(bad, ["bird"])
    with pytest.raises(SegsynError, match="at least one class"): build_prompt("a bird", [])
    with pytest.raises(SegsynError, match="bird"): build_prompt("a bird", ["birt"], names=["boat", "bird"])
    with pytest.raises(SegsynError): build_prompt("a bird", ["bird "])
    with pytest.raises(SegsynError, match="caption"): build_prompt("a bird", ["bird"], style="captions")
    assert build_prompt(None, "bird", "labels").text == "bird"


def test_top_k():
    pictures = [("a", "bcd"), ("b", "bc"), ("c", "b")]
    frequency = class_frequency(classes for _, classes in pictures)
    assert top_k_prompts("x", ["b", "c"], frequency, 2) == [("x", ("b", "c"))]
    assert top_k_prompts("x", ["d", "c", "b"], frequency, 2) == [("x", ("c", "b")), ("a photo of a d", ("d",)), ("a photo of a c", ("c",))]
    with pytest.raises(SegsynError): top_k_prompts("x", ["b"], frequency, 0)
    assert simple_prompt(["orange", "bird"]) == "a photo of an orange and a bird"
