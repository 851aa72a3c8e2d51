//! Golden bytes, for the tests of this crate and of those above it: what every form of a format was
//! written as when the format was fixed, one line `name hexbytes` each.
//!
//! Bytes that come out differently are read wrongly by what was built before, on the next node or on
//! the same disk after an upgrade. So a difference is never put right in the golden file alone.

use serde::de::value::Error as Refused;
use serde::de::{DeserializeOwned, Deserializer, Error as _, Visitor};
use serde::{Serialize, forward_to_deserialize_any};
use std::cell::Cell;
use std::fmt::Debug;
use std::path::PathBuf;

/// Set, it makes [`Golden::check`] write the file anew.
const WRITE: &str = "CFS_WRITE_GOLDEN";

/// The lines as they come out now, to be held against a file.
pub struct Golden {
    path: PathBuf,
    lines: Vec<(String, String)>,
}

impl Golden {
    /// `crate_dir`: `env!("CARGO_MANIFEST_DIR")`; the file is `tests/golden/<name>.txt` below it.
    pub fn new(crate_dir: &str, name: &str) -> Golden {
        Golden { path: PathBuf::from(format!("{crate_dir}/tests/golden/{name}.txt")), lines: Vec::new() }
    }

    /// A structure that draws its bytes itself.
    pub fn bytes(&mut self, name: &str, bytes: &[u8]) {
        assert!(!name.contains(char::is_whitespace), "'{name}' is not one word");
        assert!(self.lines.iter().all(|(other, _)| other != name), "{name} is there twice");
        self.lines.push((name.to_owned(), bytes.iter().map(|byte| format!("{byte:02x}")).collect()));
    }

    /// A postcard body, which must also be read as what it was.
    pub fn body<T: Serialize + DeserializeOwned + Debug>(&mut self, name: &str, value: &T) {
        self.bytes(name, &written(value));
    }

    /// The same for values of one enum, each named by its variant: all variants there are.
    pub fn variants<T: Serialize + DeserializeOwned + Debug>(&mut self, values: &[T]) {
        let (enumeration, variants) = variants_of::<T>();
        let mut found = vec![0; variants.len()];
        for value in values {
            let bytes = written(value);
            // postcard begins an enum with the number of its variant: one byte below 128.
            let number = usize::from(bytes[0]);
            found[number] += 1;
            let again = if found[number] > 1 { format!(".{}", found[number]) } else { String::new() };
            self.bytes(&format!("{enumeration}::{}{again}", variants[number]), &bytes);
        }
        let missing: Vec<&str> =
            variants.iter().zip(found).filter(|(_, count)| *count == 0).map(|(name, _)| *name).collect();
        assert!(missing.is_empty(), "nothing pins the bytes of {enumeration}::{}", missing.join(", "));
    }

    /// Holds all lines against the file.
    pub fn check(self) {
        let path = self.path.display();
        if std::env::var_os(WRITE).is_some() {
            let text: String = self.lines.iter().map(|(name, hex)| format!("{name} {hex}\n")).collect();
            std::fs::write(&self.path, text).unwrap_or_else(|error| panic!("{path}: {error}"));
        }
        let golden = std::fs::read_to_string(&self.path).unwrap_or_else(|error| panic!("{path}: {error}"));
        let differences = differences(&golden, &self.lines);
        assert!(
            differences.is_empty(),
            "bytes that are sent or stored differ from {path}:\n{}\nWhat was built before reads them wrongly: a \
             changed form needs a new version of its format or protocol (docs/on-disk.md, docs/wire.md), and a new \
             form a line in the file. {WRITE}=1 writes the file anew.",
            differences.join("\n")
        );
    }
}

fn written<T: Serialize + DeserializeOwned + Debug>(value: &T) -> Vec<u8> {
    let bytes = postcard::to_stdvec(value).expect("plain values encode");
    let (read, rest) = postcard::take_from_bytes::<T>(&bytes).expect("what was written is read");
    assert!(rest.is_empty(), "{value:?} is read without its end");
    assert_eq!(format!("{read:?}"), format!("{value:?}"), "it is read as something else");
    bytes
}

/// What differs, each named.
fn differences(golden: &str, lines: &[(String, String)]) -> Vec<String> {
    let golden: Vec<(&str, &str)> = golden.lines().map(|line| line.split_once(' ').unwrap_or((line, ""))).collect();
    let mut found = Vec::new();
    for (name, hex) in lines {
        match golden.iter().find(|(other, _)| other == name) {
            Some((_, old)) if old == hex => {}
            Some((_, old)) => found.push(format!("{name} was {old}\n{name} is  {hex}")),
            None => found.push(format!("{name} has no line: {hex}")),
        }
    }
    let gone = golden.iter().filter(|(name, _)| lines.iter().all(|(other, _)| other != name));
    found.extend(gone.map(|(name, _)| format!("{name} is there no more")));
    found
}

/// Name and variants of an enum, as its own decoder asks for them.
fn variants_of<T: DeserializeOwned>() -> (&'static str, &'static [&'static str]) {
    let asked = Cell::new(None);
    let refused = T::deserialize(Asked(&asked)).is_err();
    asked.get().filter(|_| refused).expect("an enum asks for its variants")
}

/// Reads nothing but what is asked for.
struct Asked<'a>(&'a Cell<Option<(&'static str, &'static [&'static str])>>);

impl<'de> Deserializer<'de> for Asked<'_> {
    type Error = Refused;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Refused> {
        Err(Refused::custom("not an enum"))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Refused> {
        self.0.set(Some((name, variants)));
        Err(Refused::custom("this is all that was to be known"))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Serialize, Deserialize)]
    enum Sample {
        Empty,
        Sized { length: u16, width: u16 },
    }

    fn golden() -> Golden {
        Golden::new(env!("CARGO_MANIFEST_DIR"), "nothing")
    }

    #[test]
    fn a_line_that_changed_is_new_or_is_gone_is_named() {
        let mut golden = golden();
        golden.variants(&[Sample::Empty, Sample::Sized { length: 300, width: 7 }]);
        golden.bytes("page", b"\x00\xff");
        let file = "Sample::Empty 00\nSample::Sized 01ac0207\npage 00ff\n";
        assert_eq!(differences(file, &golden.lines), Vec::<String>::new());
        // Written by a decoder whose fields stood the other way around, and before there were pages.
        let file = "Sample::Empty 00\nSample::Sized 0107ac02\nSample::Gone 02\n";
        let told = [
            "Sample::Sized was 0107ac02\nSample::Sized is  01ac0207",
            "page has no line: 00ff",
            "Sample::Gone is there no more",
        ];
        assert_eq!(differences(file, &golden.lines), told);
    }

    #[test]
    #[should_panic(expected = "nothing pins the bytes of Sample::Empty")]
    fn a_variant_without_a_value_fails() {
        golden().variants(&[Sample::Sized { length: 300, width: 7 }]);
    }

    #[test]
    #[should_panic(expected = "is read as something else")]
    fn a_field_that_is_not_written_fails() {
        #[derive(Debug, Serialize, Deserialize)]
        struct Lossy {
            #[serde(skip)]
            lost: u8,
        }
        let lossy = Lossy { lost: 1 };
        assert_eq!(lossy.lost, 1);
        golden().body("lossy", &lossy);
    }
}
