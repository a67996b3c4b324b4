import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from moebert_kernels.convert import STUDENT_SHAPES, StudentShape, describe_layer_map, layer_map, make_student
from moebert_kernels.errors import UserError
from tests.convert.models import D, H, dense_model, inputs

SAME = StudentShape(2, H, D, 2)
LABELS = {"id2label": {0: "no", 1: "yes", 2: "perhaps"}, "label2id": {"no": 0, "yes": 1, "perhaps": 2}}


def deep(layers=4, name="bert-cls", **options):
    return dense_model(name, num_hidden_layers=layers, **LABELS | options)


@pytest.mark.parametrize(
    ("preset", "count"),
    [("4l-312", 14_350_874), ("6l-384", 22_713_986), ("3l-384", 17_390_594), ("6l-768", 66_956_546)],
)
def test_presets_have_the_published_numbers_of_parameters(preset, count):
    shape = STUDENT_SHAPES[preset]
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig(num_labels=2, **vars(shape)))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize(
    ("student", "teacher", "wanted"),
    [
        (3, 6, [0, 2, 4, 6]),
        (4, 12, [0, 3, 6, 9, 12]),
        (2, 5, [0, 3, 5]),
        (4, 6, [0, 2, 3, 5, 6]),
        (5, 5, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_layer_map(student, teacher, wanted):
    assert list(layer_map(student, teacher).values()) == wanted
    assert layer_map(student, teacher)[student] == teacher


def test_layer_map_is_said_in_a_line():
    assert describe_layer_map(layer_map(2, 4)) == "student <- teacher: embeddings <- embeddings, 1 <- 2, 2 <- 4"


@pytest.mark.parametrize(("layers", "wanted"), [(None, [2, 4]), ([1, 3], [1, 3])])
@pytest.mark.parametrize("name", ["bert-cls", "bert", "roberta-cls", "bert-mlm"])
def test_takes_the_teachers_layers(name, layers, wanted):
    teacher = deep(name=name) if name.endswith("cls") else dense_model(name, num_hidden_layers=4)
    student = make_student(teacher, SAME, layers=layers)
    assert type(student) is type(teacher) and student.config.num_hidden_layers == 2
    old, new = teacher.base_model.encoder.layer, student.base_model.encoder.layer
    for layer, number in zip(new, wanted, strict=True):
        for one, other in zip(layer.parameters(), old[number - 1].parameters(), strict=True):
            assert torch.equal(one, other) and one.data_ptr() != other.data_ptr()
    rest = {key: tensor for key, tensor in student.state_dict().items() if ".layer." not in key}
    assert rest and all(torch.equal(tensor, teacher.state_dict()[key]) for key, tensor in rest.items())


def test_a_student_with_all_layers_is_the_teacher():
    teacher, batch = deep(), inputs()
    student = make_student(teacher, StudentShape(4, H, D, 2))
    assert torch.equal(student(**batch).logits, teacher(**batch).logits)
    assert student.config.id2label == LABELS["id2label"]


def test_random_depends_on_the_seed_alone():
    teacher, state = deep(), torch.get_rng_state()
    small = StudentShape(1, 8, 12, 4)
    one, two, other = (make_student(teacher, small, "random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.bert.embeddings.word_embeddings.weight, other.bert.embeddings.word_embeddings.weight)
    assert one(**inputs()).logits.shape == (4, 3) and one.config.id2label == LABELS["id2label"]
    # drawn as transformers does it, not the teacher's
    assert one.bert.embeddings.word_embeddings.weight.std().item() == pytest.approx(0.3, rel=0.2)


@pytest.mark.parametrize("name", ["bert", "bert-cls", "bert-mlm"])
def test_takes_given_weights(name):
    teacher, given = deep(), dense_model(name, hidden_size=8, num_hidden_layers=1, intermediate_size=12)
    student = make_student(teacher, init=given)
    for key, tensor in given.base_model.state_dict().items():
        assert torch.equal(student.bert.state_dict()[key], tensor), key
    assert student(**inputs()).logits.shape == (4, 3) and student.config.id2label == LABELS["id2label"]


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        (StudentShape(2, 8, D, 2), {}, "hidden_size: expected the teacher's 16 with init='layers', got 8"),
        (StudentShape(2, H, 9, 2), {}, "intermediate_size: expected the teacher's 48 with init='layers', got 9"),
        (StudentShape(5, H, D, 2), {}, "layer_map: expected 1 to 4 student layers, as many as the teacher has, got 5"),
        (SAME, {"layers": [1]}, r"layers: expected 2 of the teacher's 1 to 4, got \[1\]"),
        (SAME, {"layers": [0, 4]}, r"layers: expected 2 of the teacher's 1 to 4, got \[0, 4\]"),
        (SAME, {"init": "random", "layers": [1, 2]}, "layers: expected none unless init='layers', got some"),
        (SAME, {"init": "zeros"}, "init: expected layers, random or a model, got 'zeros'"),
        (None, {}, "shape: expected one, unless init is a model, got None"),
    ],
)
def test_refuses(shape, options, message):
    with pytest.raises(UserError, match=message):
        make_student(deep(), shape, **options)


def test_refuses_other_vocabularies_families_and_shapes():
    for options, message in (
        ({"vocab_size": 61}, "init: expected a model with the teacher's vocab_size 60, got 61"),
        (
            {"max_position_embeddings": 30},
            "init: expected a model with the teacher's max_position_embeddings 24, got 30",
        ),
    ):
        with pytest.raises(UserError, match=message):
            make_student(deep(), init=dense_model("bert", **options))
    with pytest.raises(UserError, match="init: expected a model with the teacher's model_type bert, got roberta"):
        make_student(deep(), init=dense_model("roberta"))
    with pytest.raises(UserError, match="shape: expected that of the given weights"):
        make_student(deep(), StudentShape(3, H, D, 2), init=dense_model("bert"))


def test_impossible_shapes():
    with pytest.raises(UserError, match="num_attention_heads: expected a divisor of hidden_size=10, got 4"):
        StudentShape(1, 10, 12, 4)
    with pytest.raises(UserError, match="num_hidden_layers: expected at least 1, got 0"):
        StudentShape(0, 8, 12, 4)
