"""The confusion matrix against the definition, for every type and layout that reaches it."""
import numpy as np
import pytest
from segsyn.files import SegsynError
from segsyn.metrics import bootstrap_difference, bootstrap_mean_iou, class_iou, confusion_matrix, mean_iou


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("blocks", [1, 16])
def test_counts_are_exact(kind, blocks):
    draw = np.random.default_rng(blocks)
    truth, guess = (np.kron(draw.integers(0, 6, (8, 8)), np.ones((blocks, blocks), int)).astype(kind) for _ in range(2))
    truth[0] = 255
    expected = np.array([[((truth == t) & (guess == p)).sum() for p in range(6)] for t in range(6)])
    for a, b in ((truth, guess), (truth[::-1, ::2], guess[::-1, ::2]), (truth.T, guess.T)):
        found = confusion_matrix(a, b, 6)
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, [[((a == t) & (b == p)).sum() for p in range(6)] for t in range(6)])
    np.testing.assert_array_equal(confusion_matrix(truth, guess, 6), expected)


def test_abstention_is_a_miss():
    truth, guess = np.array([[0, 1, 1, 255]], np.uint8), np.array([[0, 1, 255, 255]], np.uint8)
    with pytest.raises(SegsynError): confusion_matrix(truth, guess, 2)
    table = confusion_matrix(truth, guess, 2, abstain=True)
    np.testing.assert_array_equal(table, [[1, 0, 0], [0, 1, 1]])
    np.testing.assert_allclose(class_iou(table), [1, 0.5])


def test_wrong_ids_are_named():
    with pytest.raises(SegsynError, match=r"9 \(2 pixels\)"): confusion_matrix(np.array([0, 1, 1]), np.array([9, 9, 1]), 2)
    with pytest.raises(SegsynError, match="truth"): confusion_matrix(np.array([0, -1]), np.array([0, 1]), 2)
    with pytest.raises(SegsynError): confusion_matrix(np.array([0.0]), np.array([0]), 2)


def test_empty_and_absent():
    assert np.isnan(mean_iou(confusion_matrix(np.zeros((0, 4), np.uint8), np.zeros((0, 4), np.uint8), 3)))
    assert mean_iou(confusion_matrix(np.full((2, 2), 1), np.full((2, 2), 1), 3)) == 1


def test_bootstrap_of_equal_scenes_is_a_point():
    tables = np.tile([[8, 2], [1, 9]], (10, 1, 1))
    low, high = bootstrap_mean_iou(tables, draws=50)
    assert low == pytest.approx(high) == pytest.approx(mean_iou(tables[0]))


def test_intervals_need_scenes_and_the_same_ones():
    with pytest.raises(SegsynError, match="no scenes"): bootstrap_mean_iou(np.zeros((0, 2, 2)))
    with pytest.raises(SegsynError, match="cannot be compared"): bootstrap_difference(np.ones((1, 3, 2, 2)), np.ones((1, 4, 2, 2)))
