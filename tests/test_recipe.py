"""Recipes: every shipped one parses, and whatever is wrong with one is a sentence with file and line."""
# ruff: noqa: E501 (the table of mistakes has one line each)

from pathlib import Path

import pytest
import yaml

from f2llm.errors import UsageError
from f2llm.recipe import Recipe, inputs, load, recipe_hash
from f2llm.recipe_train import TrainStage
from f2llm.yaml_lines import read_yaml

RECIPE_FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(RECIPE_FOLDER.glob("**/*.yaml"))

GOOD = """\
name: small
seed: 7
output: runs/small
stages:
  names:
    stage: names
    min_names: 50
  words:
    stage: tokenizer
    data: names
    vocab_size: 1_000
  base:
    stage: train
    data: names
    shape:
      hidden_size: 64
      intermediate_size: 128
      layers: 2
      heads: 4
      kv_heads: 2
      head_dim: 16
    tokenizer: words
    formats: [retrieval]
    instructions: false
    steps: 10
    batch_size: 8
    learning_rate: 1e-3
  scores:
    stage: evaluate
    data: names
    models: [base]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, text: str) -> str:
    """What `load` says about a wrong recipe, without the folder."""
    with pytest.raises(UsageError) as caught:
        load(write(folder, text))
    return str(caught.value).removeprefix(f"{folder}/")


def test_shipped_recipes_exist() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_parses_and_says_how_to_run_it(path: Path) -> None:
    assert load(path).stages
    assert f"f2llm run recipes/{path.relative_to(RECIPE_FOLDER)}" in path.read_text(encoding="utf-8")


def test_values_arrive(tmp_path: Path) -> None:
    recipe = load(write(tmp_path, GOOD))
    assert (recipe.name, recipe.seed, recipe.output) == ("small", 7, Path("runs/small"))
    assert list(recipe.stages) == ["names", "words", "base", "scores"]
    base = recipe.stages["base"]
    assert isinstance(base, TrainStage)
    assert (base.learning_rate, base.temperature, base.hard_negatives.clustering) == (1e-3, 0.05, 9)
    assert [(item.name, item.is_path) for item in inputs(base)] == [("names", False), ("words", False)]


# What is replaced in GOOD, by what, the text on whose line the mistake is, and what is said.
WRONG = [
    # keys
    ("learning_rate:", "learning_rat:", "learning_rat:", "unknown key 'learning_rat' in stage 'base' (train): the nearest valid key is 'learning_rate'."),
    ("min_names: 50", "zzz: 50", "zzz", "unknown key 'zzz' in stage 'names' (names): the valid keys are 'stage', 'min_names',"),
    ("      heads: 4", "      head: 4", "head: 4", "unknown key 'head' in 'shape' of stage 'base' (train): the nearest valid key is 'heads'."),
    ("seed: 7", "sed: 7", "sed: 7", "unknown key 'sed' in the recipe: the nearest valid key is 'seed'."),
    ("    batch_size: 8\n", "", "  base:", "stage 'base' (train) lacks the key 'batch_size' (queries in a step, over all ranks); add it."),
    ("name: small\n", "", "seed: 7", "the recipe lacks the key 'name' (what to call the run); add it."),
    ("    stage: names\n", "", "  names:", "stage 'names' lacks the key 'stage', one of names, files, sources,"),
    ("seed: 7", "seed: 7\nseed: 8", "seed: 8", "the key 'seed' stands here and on line 2; remove one of them."),
    # values
    ("steps: 10", "steps: many", "steps:", "'steps' of stage 'base' (train) is 'many', but it should be a valid integer."),
    ("steps: 10", 'steps: "10"', "steps:", "'steps' of stage 'base' (train) is '10', but it should be a valid integer."),
    ("steps: 10", "steps: true", "steps:", "'steps' of stage 'base' (train) is True, but it should be a valid integer."),
    ("batch_size: 8", "batch_size:", "batch_size:", "'batch_size' of stage 'base' (train) is empty, but it should be a valid integer."),
    ("    steps: 10\n", "", "  base:", "exactly one of 'steps' and 'epochs' must be given in stage 'base' (train)."),
    ("steps: 10", "steps: 10\n    epochs: 2.0", "  base:", "exactly one of 'steps' and 'epochs' must be given in stage 'base' (train)."),
    ("steps: 10", "steps: 10\n    both_directions: true", "both_directions", "'both_directions' has no effect without the joint 'objective' in stage 'base' (train)."),
    ("steps: 10", "steps: 10\n    cap_by: language", "cap_by", "'cap_by' has no effect without a 'cap' in stage 'base' (train)."),
    ("steps: 10", "steps: 10\n    objective: joint\n    gather_gradient: false", "gather_gradient", "'gather_gradient: false' exists for the f2llm-v2 'objective' only in stage 'base' (train)."),
    ("steps: 10", "steps: 10\n    lora: {rank: 4}", "lora", "'lora' adapts a trained model: give a 'base' instead of a 'shape' in stage 'base' (train)."),
    ("steps: 10", "steps: 0", "steps:", "'steps' of stage 'base' (train) is 0, but it should be greater than or equal to 1."),
    ("[retrieval]", "\n    - retrieval\n    - retrival", "- retrival", "item 2 of 'formats' of stage 'base' (train) is 'retrival', but it should be 'retrieval', 'c"),
    ("[retrieval]", "retrieval", "formats:", "'formats' of stage 'base' (train) is 'retrieval', but it should be a valid list."),
    ("[retrieval]", "[]", "formats:", "'formats' of stage 'base' (train) is [], but it should have at least 1 item after"),
    ("stage: train", "stage: trian", "stage: trian", "unknown kind 'trian' of stage 'base': the nearest valid kind is 'train'."),
    ("  base:", "  Base:", "  Base:", "'Base' cannot be the name of a stage: it should start with a lower-case letter or digit"),
    (GOOD[GOOD.index("stages:") :], "stages: 3", "stages:", "'stages' is 3, but it should be a mapping, that is, lines of 'key: value'."),
    (GOOD[GOOD.index("    stage: evaluate") :], "    - a", "  scores:", "stage 'scores' is ['a'], but it should be a mapping"),
    (GOOD, "", "", "the recipe is empty, but it should be a mapping"),
    (GOOD, "- a", "- a", "the recipe is ['a'], but it should be a mapping"),
    # references
    ("models: [base]", "models:\n    - bse", "- bse", "'models' of stage 'scores' (evaluate) is 'bse', which is no stage of this recipe, but it should name an earlier stage of a model: the nearest valid stage is 'base'."),
    ("tokenizer: words", "tokenizer: names", "tokenizer: names", "'tokenizer' of stage 'base' (train) is 'names', a names stage, but it should name an earlier tokenizer stage: the valid stages are 'words'."),
    ("    data: names\n    vocab_size", "    data: base\n    vocab_size", "data: base", "'data' of stage 'words' (tokenizer) is 'base', which comes no earlier, but it should name an earlier stage of rows: the valid stages are 'names'."),
    # things that do not fit together
    ("    tokenizer: words\n", "", "  base:", "'tokenizer' goes with 'shape': a new decoder needs one, a 'base' brings its own in stage 'base'"),
    ("tokenizer: words", "base: ./model", "  base:", "exactly one of 'base' (go on from a model) and 'shape' (a new one) must be given in stage 'base' (train)."),
    ("kv_heads: 2", "kv_heads: 3", "kv_heads:", "'kv_heads' (3) must divide 'heads' (4) in 'shape' of stage 'base' (train)."),
    ("steps: 10", "steps: 10\n    warmup_steps: 11", "warmup_steps", "'warmup_steps' (11) exceeds 'steps' (10) in stage 'base' (train)."),
    ("steps: 10", "steps: 10\n    distillation: {}", "distillation", "'distillation' has no effect without a 'teacher' in stage 'base' (train)."),
    ("steps: 10", "steps: 10\n    document_instruction_rate: 1", "document_instruction_rate", "'document_instruction_rate' has no effect without 'instructions' in"),
    # YAML
    ("seed: 7", "seed: [7", "output:", "not valid YAML ("),
    ("seed: 7", "seed: !!python/name:os.system 7", "seed:", "the tag 'tag:yaml.org,2002:python/name:os.system' is not understood; write the plain value."),
    ("seed: 7", "seed: &a [*a]", "seed:", "this alias stands inside the very thing it repeats; write the value out."),
    ("seed: 7", "[seed]: 7", "[seed]", "a key must be a plain word."),
    ("seed: 7", "<<: 7", "<<: 7", "'<<' must be followed by a mapping; write '<<: *name' with an anchor '&name'."),
]  # fmt: skip


def test_aliases_of_aliases_do_not_fill_the_memory(tmp_path: Path) -> None:
    levels = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    (tmp_path / "bomb.yaml").write_text("\n".join(levels))
    with pytest.raises(UsageError, match="more than 10,000 values"):
        load(tmp_path / "bomb.yaml")


@pytest.mark.parametrize(("old", "new", "at", "sentence"), WRONG, ids=range(len(WRONG)))
def test_wrong_recipe_is_one_sentence_with_its_line(
    tmp_path: Path, old: str, new: str, at: str, sentence: str
) -> None:
    assert GOOD.count(old) == 1
    text = GOOD.replace(old, new)
    line = 1 + text[: text.index(at)].count("\n")
    said = refusal(tmp_path, text)
    assert said.startswith(f"recipe.yaml:{line}: {sentence}")
    assert said.endswith(".") and "\n" not in said


def test_several_problems_give_the_first_and_their_number(tmp_path: Path) -> None:
    wrong = (
        GOOD.replace("steps: 10", "steps: ten")
        .replace("seed: 7", "seed: -1")
        .replace("heads: 4", "heads: no")
    )
    said = refusal(tmp_path, wrong.replace("    batch_size: 8\n", ""))
    assert said == "recipe.yaml:2: 'seed' is -1, but it should be greater than or equal to 0 (and 3 more)."
    several = refusal(tmp_path, GOOD.replace("[base]", "[a, base, names]"))
    assert several.startswith("recipe.yaml:31:") and several.endswith(" (and 1 more).")


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="absent.yaml does not exist"):
        load(tmp_path / "absent.yaml")
    with pytest.raises(UsageError, match="cannot be read"):
        load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("name: é".encode("latin-1"))
    with pytest.raises(UsageError, match="not UTF-8"):
        load(tmp_path / "latin.yaml")
    (tmp_path / "control.yaml").write_bytes(b"name: \x01")
    with pytest.raises(UsageError, match="control.yaml: not valid YAML"):
        load(tmp_path / "control.yaml")


def test_base_with_a_slash_is_a_path(tmp_path: Path) -> None:
    shape = GOOD[GOOD.index("    shape:") : GOOD.index("    formats:")]
    base = load(write(tmp_path, GOOD.replace(shape, "    base: ../models/base\n"))).stages["base"]
    assert [(item.name, item.is_path) for item in inputs(base)] == [
        ("names", False),
        ("../models/base", True),
    ]
    said = refusal(tmp_path, GOOD.replace(shape, "    base: model\n"))
    assert "should name an earlier stage of a model, or a path with a slash" in said


def test_scalars_follow_yaml_1_2(tmp_path: Path) -> None:
    text = "{a: 1e-3, b: no, c: 12:30, d: 010, e: 27_000_000, f: -.5, g: '1', h: Yes, i: ~, j: True, no: 1, k: 2024-01-02}"
    values = read_yaml(write(tmp_path, text)).value
    expected = {"a": 1e-3, "b": "no", "c": "12:30", "d": 10, "e": 27_000_000, "f": -0.5, "g": "1", "h": "Yes"}
    assert values == expected | {"i": None, "j": True, "no": 1, "k": "2024-01-02"}
    assert isinstance(values["e"], int) and values["j"] is True


def test_values_without_yaml_1_1_oddities_equal_pyyaml(tmp_path: Path) -> None:
    text = GOOD.replace("1e-3", "0.001")
    assert read_yaml(write(tmp_path, text)).value == yaml.safe_load(text)


def test_merged_keys_keep_their_own_lines(tmp_path: Path) -> None:
    text = "a: &a\n  x: 1\n  y: [1, 2]\nb:\n  y: [3, 4]\n  <<: *a\nc:\n  <<: [*a, {x: 5, z: 6}]\n"
    document = read_yaml(write(tmp_path, text))
    assert document.value == yaml.safe_load(text)
    assert [document.line(("b", key)) for key in ("x", "y")] == [2, 5]
    assert (document.line(("b", "y", 1)), document.line(("b", "absent")), document.line(("absent",))) == (
        5,
        4,
        1,
    )


def test_hash_is_of_what_decides_the_result(tmp_path: Path) -> None:
    recipe = load(write(tmp_path, GOOD))
    same = (
        GOOD.replace("runs/small", "runs/elsewhere").replace("name: small", "name: other") + "# a comment\n"
    )
    assert recipe_hash(load(write(tmp_path, same))) == recipe_hash(recipe)
    for old, new in (("seed: 7", "seed: 8"), ("steps: 10", "steps: 11"), ("min_names: 50", "positives: 3")):
        assert recipe_hash(load(write(tmp_path, GOOD.replace(old, new)))) != recipe_hash(recipe)


def test_every_field_says_what_it_means() -> None:
    """Descriptions end up in messages, so each is one plain phrase."""
    definitions = Recipe.model_json_schema()["$defs"]
    fields = {
        (model, name): field
        for model in definitions
        for name, field in definitions[model]["properties"].items()
    }
    assert len(fields) > 40
    for (model, name), field in fields.items():
        if name != "stage":
            assert field.get("description", "").rstrip(".") == field.get("description") != "", (model, name)
