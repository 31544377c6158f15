//! Lines that people can paste into a POSIX shell: this program as they can call it, and words in quotes.

use std::path::{Path, PathBuf};

/// How a shell calls this program: by its name where `PATH` leads to this very file, else by its path.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "a printed line is looked up where a shell looks")]
pub fn program() -> String {
    let Ok(own) = std::env::current_exe() else { return NAME.to_owned() };
    let path = std::env::var_os("PATH").unwrap_or_default();
    called(&own, std::env::split_paths(&path))
}

const NAME: &str = "tidewire";

fn called(own: &Path, mut path: impl Iterator<Item = PathBuf>) -> String {
    // The first of that name is the one that a shell runs; another build would not know what is printed here.
    let first = path.find_map(|folder| folder.join(NAME).canonicalize().ok());
    match own.canonicalize() {
        Ok(own) if first.as_ref() == Some(&own) => NAME.to_owned(),
        _ => quoted(&own.to_string_lossy()),
    }
}

/// A printed command of this program, `tidewire …`, with [`program`] for its first word; other text as it is.
#[must_use]
pub fn pasteable(line: &str) -> String {
    match line.strip_prefix("tidewire ") {
        Some(rest) => format!("{} {rest}", program()),
        None => line.to_owned(),
    }
}

/// In single quotes, where a POSIX shell would read the word otherwise.
#[must_use]
pub fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-.,:/@%+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Found in use: nothing that was printed could be pasted, because `tidewire` was not on the PATH.
    #[test]
    fn the_program_is_named_as_a_shell_finds_it() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| {
            let path = folder.path().join(name);
            std::fs::create_dir_all(&path).unwrap();
            path.canonicalize().unwrap()
        };
        let (own, other, empty) = (at("own build"), at("other"), at("empty"));
        for path in [&own, &other] {
            std::fs::write(path.join(NAME), "").unwrap();
        }
        let program = own.join(NAME);
        let by_path = format!("'{}'", program.display());
        for (path, want) in [
            (vec![], by_path.as_str()),
            (vec![&empty], &by_path),
            (vec![&empty, &own], NAME),
            (vec![&own, &other], NAME),
            (vec![&other, &own], &by_path),
        ] {
            assert_eq!(called(&program, path.into_iter().cloned()), want);
        }
    }

    #[test]
    fn a_shell_reads_a_quoted_word_as_it_was() {
        for word in
            ["", "public.orders", "it's", "a b", "$HOME", "`x`", "event:*", "\"q\"", "a\nb", "!", "status = 'paid'"]
        {
            let script = format!("printf %s {}", quoted(word));
            let output = std::process::Command::new("/bin/sh").args(["-c", &script]).output().unwrap();
            assert_eq!(String::from_utf8(output.stdout).unwrap(), word);
        }
    }
}
