"""Execution match: pairs of queries that are known to agree or not, and queries that must not do harm."""

import time

import pytest

from safemoe_jax.evaluation.sql import create_statements, execution_match, literals

PEOPLE = ["CREATE TABLE people (id INTEGER, name VARCHAR, age INTEGER, city VARCHAR)"]
SHOPS = [*PEOPLE, "CREATE TABLE shop (owner_id INTEGER, income REAL)"]


@pytest.mark.parametrize(
    ("tables", "reference", "answer"),
    [
        (
            PEOPLE,
            "SELECT name FROM people WHERE age > 56",
            "select p.name from people p where not p.age <= 56",
        ),
        (
            PEOPLE,
            "SELECT name FROM people WHERE city = 'Rome'",
            'SELECT name FROM people WHERE city = "Rome";',
        ),
        (PEOPLE, "SELECT age FROM people ORDER BY age", "SELECT age FROM people"),
        (PEOPLE, "SELECT COUNT(*) FROM people", "SELECT SUM(1) FROM people"),
        (PEOPLE, "SELECT AVG(age) FROM people", "SELECT SUM(age) * 1.0 / COUNT(age) FROM people"),
        (
            SHOPS,
            "SELECT name FROM people WHERE id IN (SELECT owner_id FROM shop)",
            "SELECT name FROM people p WHERE EXISTS (SELECT 1 FROM shop WHERE owner_id = p.id)",
        ),
        (
            SHOPS,
            "SELECT name FROM people WHERE NOT id IN (SELECT owner_id FROM shop)",
            "SELECT name FROM people LEFT JOIN shop ON id = owner_id WHERE owner_id IS NULL",
        ),
    ],
)
def test_equivalent_queries_match(tables, reference, answer):
    assert execution_match(tables, reference, answer) == 1.0


@pytest.mark.parametrize(
    ("tables", "reference", "answer"),
    [
        (PEOPLE, "SELECT name FROM people WHERE age > 56", "SELECT name FROM people WHERE age >= 56"),
        (PEOPLE, "SELECT name FROM people WHERE age > 56", "SELECT name FROM people WHERE age > 57"),
        (
            PEOPLE,
            "SELECT name FROM people WHERE city = 'Rome'",
            "SELECT name FROM people WHERE city = 'Oslo'",
        ),
        (PEOPLE, "SELECT name FROM people WHERE city LIKE '%Rome%'", "SELECT name FROM people"),
        (PEOPLE, "SELECT DISTINCT age FROM people", "SELECT age FROM people"),
        (PEOPLE, "SELECT name, age FROM people", "SELECT age, name FROM people"),
        (PEOPLE, "SELECT MAX(age) FROM people", "SELECT MIN(age) FROM people"),
        (
            PEOPLE,
            "SELECT name FROM people WHERE age > 5 AND city = 'Rome'",
            "SELECT name FROM people WHERE age > 5 OR city = 'Rome'",
        ),
        (
            SHOPS,
            "SELECT name FROM people JOIN shop ON id = owner_id",
            "SELECT name FROM people JOIN shop ON id <> owner_id",
        ),
        (
            SHOPS,
            "SELECT name FROM people WHERE id IN (SELECT owner_id FROM shop)",
            "SELECT name FROM people JOIN shop ON id = owner_id",
        ),
        (PEOPLE, "SELECT name FROM people", "SELECT nothing FROM nowhere"),
        (PEOPLE, "SELECT name FROM people", ""),
        (PEOPLE, "SELECT name FROM people", "I'm sorry, I cannot answer."),
        (PEOPLE, "SELECT name FROM people", "SELECT name FROM people; SELECT 1"),
    ],
)
def test_different_queries_do_not_match(tables, reference, answer):
    assert execution_match(tables, reference, answer) == 0.0


@pytest.mark.parametrize(
    ("tables", "reference"),
    [
        (PEOPLE, "SELECT nothing FROM people"),
        (PEOPLE, "SELECT city FROM people GROUP BY city HAVING COUNT(*) > 500"),
        (["CREATE TABLE broken ("], "SELECT 1"),
    ],
)
def test_what_the_rows_cannot_decide_is_undefined(tables, reference):
    assert execution_match(tables, reference, reference) is None


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM people",
        "DROP TABLE people",
        "CREATE TABLE other (a)",
        "PRAGMA database_list",
        "ATTACH DATABASE '{folder}/written.db' AS other",
        "VACUUM INTO '{folder}/written.db'",
        "SELECT load_extension('{folder}/written')",
        "SELECT age + random() FROM people",
    ],
)
def test_an_answer_may_only_read(query, tmp_path):
    reference = "SELECT COUNT(*) FROM people"
    assert execution_match(PEOPLE, reference, query.format(folder=tmp_path)) == 0.0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "query",
    [
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n",
        "SELECT COUNT(*) FROM people a, people b, people c, people d, people e, people f",
        "SELECT replace(hex(zeroblob(50000)), '0', hex(zeroblob(50000)))",
    ],
)
def test_an_endless_answer_is_stopped(query):
    start = time.process_time()
    assert execution_match(PEOPLE, "SELECT name FROM people", query) == 0.0
    assert time.process_time() - start < 5


def test_verdicts_are_the_same_every_time():
    pair = ("SELECT name FROM people WHERE age > 5", "SELECT name FROM people WHERE age > 5 AND id > 1")
    assert len({execution_match(PEOPLE, *pair) for _ in range(5)}) == 1


def test_tables_declared_twice_have_the_columns_of_both():
    twice = ["CREATE TABLE t (a INTEGER)", "CREATE TABLE T (a INTEGER, b INTEGER)"]
    assert execution_match(twice, "SELECT a FROM t WHERE b > 2", "SELECT a FROM t WHERE NOT b <= 2") == 1.0


def test_keys_and_constraints_are_kept():
    keyed = ["CREATE TABLE t (a INTEGER PRIMARY KEY, b TEXT NOT NULL UNIQUE)"]
    assert execution_match(keyed, "SELECT COUNT(a) FROM t", "SELECT COUNT(DISTINCT a) FROM t") == 1.0


def test_create_statements_in_a_prompt():
    text = "Question: x (y) ?\nTable: CREATE TABLE a (n VARCHAR(20), m INT); create table b (c INT)\nmore"
    assert create_statements(text) == ["CREATE TABLE a (n VARCHAR(20), m INT)", "create table b (c INT)"]
    assert create_statements("CREATE TABLE cut (a INT, b") == []


def test_literals():
    query = "SELECT t1.a FROM t1 WHERE b = 'New York' AND c LIKE \"%ax%\" AND d > -4.5 AND e = 7 OR f = 7"
    assert literals(query) == ["New York", "ax", "-4.5", "7"]
