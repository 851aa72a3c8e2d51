//! A command line that is not understood, as programs with one line for an error say it.

use clap::error::ErrorKind;

/// What clap has to say of a misuse, its paragraphs as parts of one line.
pub fn in_one_line(misuse: &clap::Error) -> String {
    // What is said then is a page of help.
    if misuse.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return "a command is missing; For more information, try '--help'.".to_owned();
    }
    let text = misuse.render().to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let words = |paragraph: &str| paragraph.split_whitespace().collect::<Vec<_>>().join(" ");
    text.split("\n\n").map(words).filter(|words| !words.is_empty()).collect::<Vec<_>>().join("; ")
}

/// What to say of a misspelt variable in this process's environment.
pub fn in_environment(command: &clap::Command) -> Option<String> {
    let (wrong, meant) = misspelt_variable(command, std::env::vars_os().map(|(name, _)| name))?;
    Some(format!("environment variable {wrong} is unknown; did you mean {meant}?"))
}

/// A misspelt variable, and the one of `command` that was meant: it differs by one letter. Others may be
/// anybody's.
fn misspelt_variable(
    command: &clap::Command,
    names: impl IntoIterator<Item = std::ffi::OsString>,
) -> Option<(String, String)> {
    let mut known = Vec::new();
    let mut commands = vec![command];
    while let Some(command) = commands.pop() {
        known.extend(command.get_arguments().filter_map(|argument| argument.get_env()?.to_str()));
        commands.extend(command.get_subcommands());
    }
    names.into_iter().filter_map(|name| name.into_string().ok()).find_map(|name| {
        let nearest = known.iter().find(|known| strsim::damerau_levenshtein(known, &name) == 1)?;
        (!known.contains(&name.as_str())).then(|| (name.clone(), (*nearest).to_owned()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{Arg, Command};

    #[test]
    fn a_variable_that_differs_by_one_letter_is_misspelt_and_no_other() {
        let arguments = [Arg::new("size").long("size").env("CFS_SIZE"), Arg::new("lease").env("CFS_LEASE_MS")];
        let command = Command::new("cfs").subcommand(Command::new("dev").args(arguments));
        let misspelt = |names: &[&str]| misspelt_variable(&command, names.iter().map(|name| (*name).into()));
        assert_eq!(misspelt(&["CFS_SIZE", "CFS_LEASE_MS", "CFS_SIDES", "HOME", "CFS_WORK"]), None);
        for wrong in ["CFS_LESE_MS", "CFS_LEAES_MS", "CFS_LEASE_M"] {
            assert_eq!(misspelt(&["HOME", wrong]), Some((wrong.to_owned(), "CFS_LEASE_MS".to_owned())));
        }
    }
}
