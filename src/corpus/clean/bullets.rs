//! One bullet for all: `•`, `●`, `▪`, `◦` and the `z` or `°` that a symbol font leaves behind become items of
//! their own. Knows only the text of one block.

const BULLETS: [char; 11] = ['•', '●', '▪', '◦', '‣', '■', '□', '○', '❖', '➢', '✓'];

/// Splits a block at its bullets. The first part is what stood before any bullet, possibly empty; the others are
/// items, never empty.
pub(crate) fn split(text: &str) -> (String, Vec<String>) {
    let mut lead = String::new();
    let mut items: Vec<String> = Vec::new();
    let words = text.split_whitespace().collect::<Vec<_>>();
    for (index, word) in words.iter().enumerate() {
        let before = index.checked_sub(1).map(|previous| words[previous]);
        if is_bullet(word, before, words.get(index + 1).copied()) {
            items.push(String::new());
            continue;
        }
        let part = items.last_mut().unwrap_or(&mut lead);
        // A bullet may be glued to its word: `•Vendors`.
        let (glued, word) = match word.strip_prefix(BULLETS) {
            Some(rest) => (true, rest),
            None => (false, *word),
        };
        if glued {
            items.push(word.to_owned());
        } else {
            if !part.is_empty() {
                part.push(' ');
            }
            part.push_str(word);
        }
    }
    items.retain(|item| !item.is_empty());
    (lead, items)
}

fn is_bullet(word: &str, before: Option<&str>, next: Option<&str>) -> bool {
    let next_is_upper = next.is_some_and(|next| next.starts_with(char::is_uppercase));
    match word {
        // A degree sign stands between a number and a unit; a bullet does not.
        "°" | "\u{2da}" => {
            !before.is_some_and(|before| before.ends_with(|char: char| char.is_ascii_digit()))
        }
        // The glyph `z` of a symbol font: only where a sentence begins.
        "z" => next_is_upper && before.is_none_or(|before| before.ends_with(['.', ':', ';', '!', '?'])),
        _ => !word.is_empty() && word.chars().all(|char| BULLETS.contains(&char)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, lead: &str, items: &[&str]) {
        let (got_lead, got_items) = split(text);
        assert_eq!(got_lead, lead);
        assert_eq!(got_items, items);
    }

    #[test]
    fn bullets_inside_a_block_become_items() {
        check(
            "Primary • Vendors ● Resellers ▪ Other buyers",
            "Primary",
            &["Vendors", "Resellers", "Other buyers"],
        );
        check("•Vendors •Buyers", "", &["Vendors", "Buyers"]);
    }

    #[test]
    fn a_lone_z_before_a_sentence_is_a_bullet() {
        check(
            "Leaders do this: z Plan ahead. z Listen to people.",
            "Leaders do this:",
            &["Plan ahead.", "Listen to people."],
        );
        check("the axes x, y and z All", "the axes x, y and z All", &[]);
    }

    #[test]
    fn degrees_are_no_bullets() {
        check("water boils at 100 ° here", "water boils at 100 ° here", &[]);
        check("° Distributors ° Experts", "", &["Distributors", "Experts"]);
    }

    #[test]
    fn bullets_without_text_vanish() {
        check("• •", "", &[]);
    }
}
