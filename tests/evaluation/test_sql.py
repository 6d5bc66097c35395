"""Execution match: pairs of queries that are known to agree or not, and queries that must not do harm."""

import time

import pytest

from safemoe_jax.evaluation.sql import create_statements, execution_match, literals

PEOPLE = ["CREATE TABLE people (id INTEGER, name VARCHAR, age INTEGER, city VARCHAR)"]
YEARS = ["CREATE TABLE show (year VARCHAR)"]
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
        (PEOPLE, "SELECT age FROM people", "SELECT age FROM people ORDER BY age"),
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
        (PEOPLE, "SELECT COUNT(name) FROM people", "SELECT COUNT(*) FROM people"),
        (PEOPLE, "SELECT name FROM people WHERE city LIKE '%a%'", "SELECT name FROM people"),
        (YEARS, "SELECT COUNT(*) FROM show WHERE year >= 2005", "SELECT COUNT(*) FROM show"),
        (YEARS, "SELECT COUNT(*) FROM show WHERE year >= 100", "SELECT COUNT(*) FROM show"),
        (
            YEARS,
            "SELECT COUNT(*) FROM show WHERE year >= 2005",
            "SELECT COUNT(*) FROM show WHERE year > 2005",
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
    ("reference", "answer", "right"),
    [
        ("SELECT name FROM people ORDER BY age", "SELECT name FROM people ORDER BY age DESC", False),
        ("SELECT name FROM people ORDER BY age DESC", "SELECT name FROM people", False),
        ("SELECT name FROM people ORDER BY age", "SELECT name FROM people ORDER BY name", False),
        ("SELECT name, age FROM people ORDER BY 2", "SELECT name, age FROM people ORDER BY 2 DESC", False),
        (
            "SELECT city, COUNT(*) AS n FROM people GROUP BY city ORDER BY n",
            "SELECT city, COUNT(*) AS n FROM people GROUP BY city ORDER BY n DESC",
            False,
        ),
        # Rows of the same age may come in any order, which further keys and other plans change.
        ("SELECT name FROM people ORDER BY age", "SELECT name FROM people ORDER BY age, name DESC", True),
        ("SELECT name FROM people ORDER BY age DESC;", "SELECT name FROM people ORDER BY age DESC, id", True),
        ("SELECT name, age FROM people ORDER BY 2", "SELECT name, age FROM people ORDER BY age, name", True),
        (
            "SELECT city, COUNT(*) AS n FROM people GROUP BY city ORDER BY n",
            "SELECT city, COUNT(*) FROM people GROUP BY city ORDER BY COUNT(*), city DESC",
            True,
        ),
        # Here the inner order decides nothing, and the outer query promises none.
        (
            "SELECT name FROM (SELECT name, age FROM people ORDER BY age)",
            "SELECT name FROM people ORDER BY age DESC",
            True,
        ),
        (
            "SELECT name FROM people WHERE name <> 'x ORDER BY y'",
            "SELECT name FROM people WHERE name <> 'x ORDER BY y' ORDER BY age",
            True,
        ),
    ],
)
def test_the_order_counts_where_the_reference_asks_for_one(reference, answer, right):
    assert execution_match(PEOPLE, reference, answer) == right


@pytest.mark.parametrize(
    "reference",
    [
        "SELECT name FROM people UNION SELECT city FROM people ORDER BY name",
        "SELECT 1 UNION SELECT age FROM people ORDER BY 1",
        "SELECT DISTINCT name FROM people ORDER BY LENGTH(name)",
    ],
)
def test_the_order_counts_in_a_union_and_with_distinct(reference):
    assert execution_match(PEOPLE, reference, f"{reference} ") == 1.0
    assert execution_match(PEOPLE, reference, f"{reference} DESC") == 0.0


@pytest.mark.parametrize("word", ["ob", "12", "a%b"])
def test_patterns_that_differ_in_one_wildcard_do_not_match(word):
    conditions = [f"LIKE '%{word}%'", f"LIKE '{word}%'", f"LIKE '%{word}'", f"= '{word}'"]
    queries = [f"SELECT COUNT(*) FROM people WHERE name {condition}" for condition in conditions]
    verdicts = [[execution_match(PEOPLE, one, other) for other in queries] for one in queries]
    assert all(
        verdict == (i == j) for i, row in enumerate(verdicts) for j, verdict in enumerate(row) if i < 3
    )


def test_nulls_stand_only_where_the_schema_and_the_joins_allow_them():
    def counts_alike(column, tables):
        return execution_match(tables, f"SELECT COUNT({column}) FROM t", "SELECT COUNT(*) FROM t")

    declared = ["CREATE TABLE t (a TEXT, b TEXT NOT NULL, c INTEGER PRIMARY KEY, owner_id INTEGER, uid TEXT)"]
    assert [counts_alike(column, declared) for column in ("a", "b", "c", "owner_id", "uid")] == [
        0,
        1,
        1,
        1,
        1,
    ]
    shared = ["CREATE TABLE t (a TEXT)", "CREATE TABLE u (A TEXT)"]
    assert counts_alike("a", shared) == 1


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
    assert literals(query) == ["New York", "%ax%", "-4.5", "7"]
