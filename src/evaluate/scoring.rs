//! Is an answer right? It is when it holds, for every key fact, at least one of the fact's alternatives.
//!
//! Both sides are normalised first: lower case, accents kept, punctuation to spaces, thousands separators
//! dropped, small number words to digits, ordinal endings of days dropped (`9th May` = `9 May`). A match must
//! begin and end at a word boundary, so `12` is not found in `120` and `Ann` not in `Annual`.

use unicode_normalization::UnicodeNormalization;

/// True when `answer` holds an alternative of every key fact. `key_facts` must not be empty.
pub(crate) fn holds_key_facts(answer: &str, key_facts: &[Vec<String>]) -> bool {
    let answer = format!(" {} ", normalise(answer));
    key_facts.iter().all(|alternatives| {
        alternatives.iter().any(|alternative| {
            let wanted = normalise(alternative);
            !wanted.is_empty() && answer.contains(&format!(" {wanted} "))
        })
    })
}

/// Lower-case words separated by single spaces, as described in the header.
pub(crate) fn normalise(text: &str) -> String {
    let folded: String = text.nfkc().collect::<String>().to_lowercase();
    let characters: Vec<char> = folded.chars().collect();
    let mut spaced = String::with_capacity(folded.len());
    for (index, &character) in characters.iter().enumerate() {
        let digit_before = index > 0 && characters[index - 1].is_ascii_digit();
        let digit_after = characters.get(index + 1).is_some_and(char::is_ascii_digit);
        match character {
            ',' if digit_before && digit_after => {}
            '.' if digit_before && digit_after => spaced.push('.'),
            '%' => spaced.push_str(" percent "),
            '\'' | '’' => {}
            _ if character.is_alphanumeric() => {
                let previous = index.checked_sub(1).map(|before| characters[before]);
                let letter_meets_digit = previous.is_some_and(|before| {
                    before.is_ascii_digit() && character.is_alphabetic()
                        || before.is_alphabetic() && character.is_ascii_digit() && before != 'q'
                });
                if letter_meets_digit {
                    spaced.push(' ');
                }
                spaced.push(character);
            }
            _ => spaced.push(' '),
        }
    }
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut out: Vec<&str> = Vec::with_capacity(words.len());
    for (index, word) in words.iter().enumerate() {
        let after_number = index > 0 && words[index - 1].chars().all(|c| c.is_ascii_digit());
        if after_number && matches!(*word, "st" | "nd" | "rd" | "th") {
            continue;
        }
        out.push(number_word(word));
    }
    out.join(" ")
}

fn number_word(word: &str) -> &str {
    const WORDS: [(&str, &str); 20] = [
        ("one", "1"),
        ("two", "2"),
        ("three", "3"),
        ("four", "4"),
        ("five", "5"),
        ("six", "6"),
        ("seven", "7"),
        ("eight", "8"),
        ("nine", "9"),
        ("ten", "10"),
        ("eleven", "11"),
        ("twelve", "12"),
        ("thirteen", "13"),
        ("fourteen", "14"),
        ("fifteen", "15"),
        ("sixteen", "16"),
        ("seventeen", "17"),
        ("eighteen", "18"),
        ("nineteen", "19"),
        ("twenty", "20"),
    ];
    WORDS.iter().find(|(name, _)| *name == word).map_or(word, |(_, digits)| digits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(answer: &str, facts: &[&[&str]], expected: bool) {
        let facts: Vec<Vec<String>> =
            facts.iter().map(|fact| fact.iter().map(|&text| text.to_owned()).collect()).collect();
        assert_eq!(holds_key_facts(answer, &facts), expected, "{answer:?} against {facts:?}");
    }

    #[test]
    fn a_number_inside_a_longer_one_is_not_found() {
        check("We lost 120 seats.", &[&["12"]], false);
        check("We lost 12 seats.", &[&["12"]], true);
    }

    #[test]
    fn dates_match_in_the_forms_people_write() {
        check("It was on the 9th of May.", &[&["9 May", "May 9", "9 of May"]], true);
        check("May 9th, 2023", &[&["May 9"]], true);
        check("May 19th", &[&["May 9"]], false);
    }

    #[test]
    fn number_words_and_separators_are_folded() {
        check("She asked for three engineers", &[&["3 engineers"]], true);
        check("A budget of $1,200,000.", &[&["1200000"]], true);
        check("Churn fell to 4.5%", &[&["4.5 percent"]], true);
        check("EUR 180k", &[&["180 k", "180,000"]], true);
    }

    #[test]
    fn every_fact_is_needed_and_any_alternative_will_do() {
        check("Lena signed on Friday", &[&["Lena", "Ms Ortiz"], &["Friday"]], true);
        check("Lena signed", &[&["Lena"], &["Friday"]], false);
    }

    #[test]
    fn an_abstention_is_wrong() {
        check("I don't have any information about the deal.", &[&["Norden"]], false);
    }
}
