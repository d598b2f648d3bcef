import pickle

from llama2.errors import InvalidValue, shown


def test_the_message_is_the_field_and_the_problem_and_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(InvalidValue("tools[1].name", "must be a string, got 5")))
    assert (str(error), error.field) == ("tools[1].name must be a string, got 5", "tools[1].name")


def test_a_long_value_is_shown_by_its_beginning() -> None:
    assert shown("a") == "'a'"
    assert shown("a" * 1000) == "'" + "a" * 76 + "..."
