#!/usr/bin/env python3
"""Checks the sample data in this folder. Needs only Python 3; exits 1 on any violation.

    python3 check.py
"""
import json
import os
import re
import sys
from collections import Counter

HERE = os.path.dirname(os.path.abspath(__file__))
FACTS = 66
PHRASINGS = 4
PROMPTS = {"email-summary": 3, "technical": 3, "context-awareness": 3, "management-advice": 3}
problems = []


def bad(*what):
    problems.append(" ".join(str(w) for w in what))


def load(name):
    rows = []
    with open(os.path.join(HERE, name), encoding="utf-8") as f:
        for n, line in enumerate(f, 1):
            try:
                rows.append(json.loads(line))
            except ValueError as e:
                bad(f"{name}:{n}: not JSON: {e}")
    return rows


def norm(s):
    return " ".join(re.sub(r"[^\w\s]", "", s.lower()).split())


def grams(s):
    w = norm(s).split()
    return {tuple(w[i:i + 3]) for i in range(len(w) - 2)} or {tuple(w)}


def jaccard(a, b):
    a, b = grams(a), grams(b)
    return len(a & b) / len(a | b)


def numbers(s):
    return re.findall(r"\d+(?:[.,:]\d+)*", s)


def note(source):
    """The text of a note, or None for a PDF (its text needs an extractor)."""
    if source.endswith(".pdf"):
        return None
    with open(os.path.join(HERE, source), encoding="utf-8") as f:
        return f.read()


def examples(row):
    """The examples in a row's response; [] when the response is not valid JSON."""
    try:
        got = json.loads(row["response"])
    except ValueError:
        return []
    got = got.get("examples") if isinstance(got, dict) else None
    return got if isinstance(got, list) and all(isinstance(e, dict) for e in got) else []


def main():
    answers, questions, prompts = load("answers.jsonl"), load("questions.jsonl"), load("prompts.jsonl")

    # every row: its three keys, an existing source, a quote that occurs once
    for n, r in enumerate(answers, 1):
        if set(r) != {"source", "quote", "response"} or not all(isinstance(v, str) for v in r.values()):
            bad(f"answers.jsonl:{n}: needs exactly the string keys source, quote, response")
            continue
        if not os.path.isfile(os.path.join(HERE, r["source"])):
            bad(f"answers.jsonl:{n}: no such note {r['source']}")
            continue
        text = note(r["source"])
        if text is not None and text.count(r["quote"]) != 1:
            bad(f"answers.jsonl:{n}: quote occurs {text.count(r['quote'])} times in {r['source']}: {r['quote']}")

    # a good row holds four examples of one fact
    good, garbage = {}, 0
    held = {q["fact"]: q for q in questions}
    for n, r in enumerate(answers, 1):
        ex = examples(r)
        ids = {e.get("fact") for e in ex}
        if len(ex) == PHRASINGS and len(ids) == 1 and ids <= set(held):
            fact = ids.pop()
            if fact in good:
                bad(f"answers.jsonl:{n}: second good row for {fact}")
            good[fact] = (r, ex)
        else:
            garbage += 1

    if len(held) != len(questions):
        bad("questions.jsonl: a fact occurs twice")
    if set(held) != set(good):
        bad("facts differ:", sorted(set(held) ^ set(good)))
    if len(held) != FACTS:
        bad(f"{len(held)} facts, expected {FACTS}")
    if not 36 <= garbage <= 44:
        bad(f"{garbage} garbage rows, expected 36 to 44")

    every = [(fact, e["question"]) for fact, (_, ex) in good.items() for e in ex]
    for q, k in Counter(norm(q) for _, q in every).items():
        if k > 1:
            bad("training question occurs twice in good rows:", q)
    for (a, ka) in Counter(ex[0]["answer"] for _, ex in good.values()).items():
        if ka > 1:
            bad("two facts share an answer:", a)

    # garbage examples count as training rows too
    for r in answers:
        every += [(e.get("fact"), e.get("question", "")) for e in examples(r)]

    worst = (0.0, "", "")
    for fact, (r, ex) in good.items():
        text = note(r["source"])
        for e in ex:
            if text is None:
                continue
            for num in numbers(e["answer"]):
                if not re.search(r"(?<![\d.,])" + re.escape(num) + r"(?!\d)", text):
                    bad(f"{fact}: number {num} of the answer is not in {r['source']}")
        for i in range(len(ex)):
            for j in range(i):
                if jaccard(ex[i]["question"], ex[j]["question"]) >= 0.5:
                    bad(f"{fact}: two training phrasings are nearly the same: {ex[i]['question']}")
        q = held.get(fact)
        if q is None:
            continue
        if set(q) != {"id", "question", "answer", "fact", "key_facts", "source"} or q["id"] != "q-" + fact:
            bad(f"{fact}: malformed row in questions.jsonl")
        if q["source"] != r["source"]:
            bad(f"{fact}: sources differ")
        for _, t in every:
            if norm(t) == norm(q["question"]):
                bad(f"{fact}: held-out question is a training question")
            v = jaccard(t, q["question"])
            if v > worst[0]:
                worst = (v, q["question"], t)
            if v >= 0.5:
                bad(f"{fact}: held-out question is too near to: {t} ({v:.2f})")
        for alternatives in q["key_facts"]:
            if not alternatives or not all(isinstance(a, str) and a for a in alternatives):
                bad(f"{fact}: empty key fact")
            for text_of, what in [(q["answer"], "reference answer")] + [(e["answer"], "training answer") for e in ex]:
                if not any(a.lower() in text_of.lower() for a in alternatives):
                    bad(f"{fact}: {what} satisfies none of {alternatives}")
            for a in alternatives:
                if a.lower() in q["question"].lower():
                    bad(f"{fact}: key fact {a!r} is already in the question")

    if Counter(p.get("category") for p in prompts) != Counter(PROMPTS):
        bad("prompts.jsonl: expected", PROMPTS)
    if len({p.get("id") for p in prompts}) != len(prompts) or not all(p.get("prompt") for p in prompts):
        bad("prompts.jsonl: ids must be unique and prompts non-empty")

    notes = Counter()
    for _, _, files in os.walk(os.path.join(HERE, "notes")):
        notes.update(os.path.splitext(f)[1] for f in files)
    if sum(notes.values()) < FACTS:
        bad(f"only {sum(notes.values())} notes")

    words = lambda xs: sum(len(x.split()) for x in xs) / max(1, len(xs))
    ex = [e for _, x in good.values() for e in x]
    sources = {r["source"] for r, _ in good.values()}
    print(f"notes            {sum(notes.values())} ({', '.join(f'{k} {e}' for e, k in sorted(notes.items()))})")
    print(f"facts            {len(good)} from {len(sources)} notes, {sum(s.endswith('.pdf') for s in [r['source'] for r, _ in good.values()])} from PDFs")
    print(f"good examples    {len(ex)}, mean question {words([e['question'] for e in ex]):.1f} words, mean answer {words([e['answer'] for e in ex]):.1f} words")
    print(f"answers.jsonl    {len(answers)} rows: {len(good)} good, {garbage} garbage")
    print(f"questions.jsonl  {len(questions)}, mean {words([q['question'] for q in questions]):.1f} words, nearest training question {worst[0]:.2f}")
    print(f"prompts.jsonl    {len(prompts)}")
    for p in problems:
        print("PROBLEM:", p)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
