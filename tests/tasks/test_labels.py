"""Labels as found in the wild."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dagman.errors import DagmanError
from dagman.tasks import labels, table


def make(words, patients=None, case_ids=None):
    number = len(words)
    return table.Table(
        case_ids=tuple(case_ids or (f"case_{index:02d}" for index in range(number))),
        patients=tuple(patients or (f"p{index}" for index in range(number))),
        labels=tuple(words),
        features=np.arange(2.0 * number, dtype=np.float32).reshape(number, 2),
    )


@pytest.mark.parametrize(
    ("words", "positive", "found"),
    [
        (["0", "1", "1"], None, [False, True, True]),
        (["0.0", "1", " 1.0 "], None, [False, True, True]),
        (["1", "2", "2.0"], None, [False, True, True]),
        (["0", "1"], "0", [True, False]),
        (["benign", "malignant"], "malignant", [False, True]),
    ],
)
def test_two_classes(words, positive, found):
    made = labels.classes(words, positive)
    assert made.numbers.tolist() == [int(value) for value in found]
    assert positive in (None, made.names[1])


@pytest.mark.parametrize(
    ("words", "positive", "says"),
    [
        ([], None, "0 classes"),
        (["1", "1"], None, "1 classes over 2 cases"),
        (["0", "1", "2"], "2", "3 classes"),
        (["0", "1", "yes"], "yes", "3 classes"),
        (["benign", "malignant"], None, "two words"),
        (["benign", "malignant"], "Malignant", "no case is Malignant"),
        (["0", "1"], "2", "no case is 2"),
        (["inf", "0"], None, "two words"),
        (["Benign", "benign ", "b"], "b", r"one label in several ways \(Benign: 1, benign: 1\); spell it in one way"),
        (["meta", "Meta"], "meta", "one label in several ways"),
        (["no metastasis", "metastasis"], None, "such as --positive 'no metastasis'"),
    ],
)
def test_doubtful_classes_are_refused(words, positive, says):
    with pytest.raises(DagmanError, match=f"E-LABEL.*{says}"):
        labels.classes(words, positive)


@pytest.mark.parametrize(
    ("words", "names", "numbers"),
    [
        (["liver", "heart", "lung", "heart"], ("heart", "liver", "lung"), [1, 0, 2, 0]),
        (["10", "9", "2.0", "2"], ("2", "9", "10"), [2, 1, 0, 0]),
    ],
)
def test_more_than_two_classes_are_sorted(words, names, numbers):
    made = labels.classes(words)
    assert made.names == names
    assert made.numbers.tolist() == numbers


def test_what_counts_as_unlabelled_and_the_flag_are_named():
    with pytest.raises(DagmanError, match=r"1 classes over 2 cases .*; 3 more count as unlabelled: empty, none, na"):
        labels.classes(["meta", "meta"], left_out=3)
    with pytest.raises(DagmanError, match="such as --positive meta"):
        labels.classes(["clean", "meta"])


@pytest.mark.parametrize(
    ("words", "last"),
    [
        (["benign", "malignant", "none", None, " NA ", ""], "malignant"),
        (["benign ", "malignant"], "malignant"),
        (["9", "10"], None),
        (["a", "b", "c"], None),
        (["a"], None),
    ],
)
def test_the_last_of_two_words_is_positive_where_nobody_says(words, last):
    assert labels.last_of_two(words) == last
    if len({word.strip() for word in words if word}) == 2:
        names = labels.classes(words, last).names
        assert names[1] == (last or "10")


@pytest.mark.parametrize("nothing", [None, "", "nan", "NaN", " NA ", "None"])
def test_missing_labels_are_refused_or_left_out_and_counted(nothing):
    words = ["0", "1", nothing, nothing, nothing, nothing, nothing, nothing]
    with pytest.raises(
        DagmanError, match=r"6 cases without a label \(case_02, case_03, case_04, case_05, case_06, \.\.\.\)"
    ):
        labels.labelled(make(words))
    chosen, missing = labels.labelled(make(words), "leave_out")
    assert (chosen.case_ids, missing) == (("case_00", "case_01"), 6)


def test_labels_are_told_with_the_words_that_say_there_is_none():
    assert labels.told([None, "", None]) == ""
    assert labels.told(["meta", " meta", "clean"]) == "labels: 2 meta, 1 clean"
    assert labels.told(["meta", "none", "None", None]) == (
        "labels: 1 meta, 3 without (None, none says that there is none)"
    )
    assert labels.told(list("aabcdefg")).endswith("1 c, 1 d, 1 e, 2 more classes")


def test_repeated_cases_are_refused():
    with pytest.raises(DagmanError, match=r"E-LABEL.*1 cases in more than one row \(a\)"):
        labels.labelled(make(["0", "1", "0"], case_ids=["a", "b", "a"]))


def test_rows_are_sorted_by_case_with_their_features():
    chosen, _ = labels.labelled(make(["0", "1", "0"], case_ids=["c", "a", "b"]))
    assert chosen.case_ids == ("a", "b", "c")
    assert chosen.labels == ("1", "0", "0")
    assert chosen.features[:, 0].tolist() == [2, 4, 0]


def test_labels_and_patients_from_another_file(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("case_id,metastasis,patient\ncase_01,1,q\ncase_00,0,q\n")
    found = labels.override(make([None, "9", "9"]), path, "metastasis")
    assert found.labels == ("0", "1", None)
    assert found.patients == ("q", "q", None)
    path.write_text("case_id,metastasis\ncase_01,1\n")
    assert labels.override(make([None, "9"]), path, "metastasis").patients == ("p0", "p1")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("case_id,label\nnobody,1\n", r"1 labels for cases without features \(nobody\)"),
        ("case_id,label\ncase_00,1\ncase_00,1\n", "1 cases in more than one row"),
        ("case_id,grade\ncase_00,1\n", "lacks label"),
        ("case_id,label\n", "no rows"),
        ("", "no rows"),
    ],
)
def test_label_files_that_do_not_fit_are_refused(tmp_path, text, says):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(DagmanError, match=f"E-LABEL.*{says}"):
        labels.override(make(["0", "1"]), path)


def test_a_label_file_with_other_separators_says_so(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("case_id;label\ncase_00;1\n", encoding="utf-8-sig")
    with pytest.raises(DagmanError, match=r"^E-TABLE .*: has its columns separated by ';'; save it comma-separated"):
        labels.override(make(["0", "1"]), path)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=40, deadline=None)
@given(arrays.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 4)), elements=finite))
def test_tables_are_read_as_they_were_written(tmp_path_factory, features):
    path = tmp_path_factory.mktemp("table") / "features.csv"
    words = [None, "1", 'a "quoted", word', "é", "0"][: len(features)]
    written = dataclasses.replace(make(words), features=features)
    table.write_csv(written, path)
    found = table.read_csv(path)
    assert (found.case_ids, found.patients, found.labels) == (written.case_ids, written.patients, written.labels)
    assert found.features.dtype == np.float32
    np.testing.assert_array_equal(found.features, features)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("case_id,f0\na,1\nb,x\n", "csv:3.*'x' in the column f0"),
        ("case_id,Label,f0\na,no,1\n", "'no' in the column Label.*case_id, patient, label, split"),
        ("case_id,f0\na,1,2\n", "csv:2.*3 cells, the header 2"),
        ("case_id,f0,f0\na,1,2\n", "repeats the columns f0"),
        ("case_id,label\na,1\n", "no features"),
        ('case_id,f0\na,"1\n', "cannot be read"),
        ("case_id;label;f0\na;1;0,5\n", "columns separated by ';'; save it comma-separated"),
        ("case_id\tf0\na\t1\n", "columns separated by tabs; save it comma-separated"),
    ],
)
def test_damaged_tables_are_refused_by_line(tmp_path, text, says):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(DagmanError, match=f"E-TABLE.*{says}"):
        table.read_csv(path)


def test_labels_of_new_cases_are_spelt_as_the_classes_and_strange_ones_are_named():
    assert labels.numbers_of(["1.0", " 0 ", None, "nan", "1"], ("0", "1")) == [1, 0, None, None, 1]
    assert labels.numbers_of(["benign", ""], ("benign", "malignant")) == [0, None]
    with pytest.raises(DagmanError, match=r"E-LABEL.*3 cases .*\(2: 2, x: 1\); known: 0, 1"):
        labels.numbers_of(["1", "2", "2.0", "x"], ("0", "1"))


def test_what_is_missing_is_of_no_class():
    assert labels.classes_of(["met", "none", None, "met ", "", "nomet"]) == ["met", "nomet"]
