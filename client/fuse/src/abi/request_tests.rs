use super::*;
use proptest::prelude::*;

const FEATURES: Features = Features { setxattr_ext: true, epoch: true };

/// A request of the kernel's: header and body.
fn request(opcode: u32, body: &[u8]) -> Vec<u8> {
    let len = (size_of::<InHeader>() + body.len()) as u32;
    let header = InHeader { len, opcode, unique: 5, nodeid: 9, uid: 1, gid: 2, pid: 3, ..InHeader::default() };
    [bytemuck::bytes_of(&header), body].concat()
}

fn with<T: bytemuck::NoUninit>(arguments: &T, rest: &[u8]) -> Vec<u8> {
    [bytemuck::bytes_of(arguments), rest].concat()
}

#[track_caller]
fn decoded(opcode: Opcode, body: &[u8], check: impl FnOnce(Call)) {
    let bytes = request(opcode as u32, body);
    let found = Request::decode(&bytes, FEATURES).unwrap();
    assert_eq!((found.header.unique, found.header.nodeid, found.header.pid), (5, 9, 3));
    check(found.call);
}

#[test]
fn names_and_arguments_are_where_the_kernel_puts_them() {
    let rename = with(&Rename2In { newdir: 7, flags: 1, padding: 0 }, b"old\0new\0");
    decoded(Opcode::Rename2, &rename, |call| {
        let arguments = Rename2In { newdir: 7, flags: 1, padding: 0 };
        assert_eq!(call, Call::Rename { arguments, name: b"old", new_name: b"new" });
    });
    decoded(Opcode::Rename, &with(&RenameIn { newdir: 7 }, b"a\0b\0"), |call| {
        let arguments = Rename2In { newdir: 7, flags: 0, padding: 0 };
        assert_eq!(call, Call::Rename { arguments, name: b"a", new_name: b"b" });
    });
    decoded(Opcode::Symlink, b"name\0to/where\0", |call| {
        assert_eq!(call, Call::Symlink { name: b"name", target: b"to/where" });
    });
    let arguments = WriteIn { fh: 4, offset: 8, size: 3, ..WriteIn::default() };
    decoded(Opcode::Write, &with(&arguments, b"abc"), |call| {
        assert_eq!(call, Call::Write { arguments, data: b"abc" });
    });
    let create = CreateIn { flags: 2, mode: 0o100_644, umask: 0o22, open_flags: 0 };
    decoded(Opcode::TmpFile, &with(&create, b"/\0"), |call| assert_eq!(call, Call::TmpFile(create)));
}

#[test]
fn setxattr_has_its_second_flags_only_where_agreed_upon() {
    let head =
        with(&SetXattrIn { size: 2, flags: 1 }, bytemuck::bytes_of(&SetXattrExt { setxattr_flags: 1, padding: 0 }));
    let long = request(Opcode::SetXattr as u32, &[&head[..], b"user.k\0vv"].concat());
    let expected = Call::SetXattr { flags: 1, extended: 1, name: b"user.k", value: b"vv" };
    assert_eq!(Request::decode(&long, FEATURES).unwrap().call, expected);
    let short = request(Opcode::SetXattr as u32, &with(&SetXattrIn { size: 2, flags: 1 }, b"user.k\0vv"));
    let expected = Call::SetXattr { flags: 1, extended: 0, name: b"user.k", value: b"vv" };
    assert_eq!(Request::decode(&short, Features::default()).unwrap().call, expected);
}

#[test]
fn extensions_at_the_end_are_no_part_of_the_body() {
    let mut bytes = request(Opcode::Lookup as u32, b"name\0___extends");
    bytes[36..38].copy_from_slice(&1u16.to_ne_bytes());
    let call = Request::decode(&bytes, FEATURES).unwrap().call;
    assert_eq!(call, Call::Lookup { name: b"name" });
    bytes[36..38].copy_from_slice(&u16::MAX.to_ne_bytes());
    let malformed = Malformed { unique: Some(5), what: "extensions exceed the request" };
    assert_eq!(Request::decode(&bytes, FEATURES), Err(malformed));
}

#[test]
fn short_and_endless_requests_are_refused_and_answered_if_someone_waits() {
    assert_eq!(Request::decode(&[0; 39], FEATURES).unwrap_err().unique, None);
    let cases: [(Opcode, &[u8], Option<u64>); 5] = [
        (Opcode::Read, &[0; 39], Some(5)),
        (Opcode::Lookup, b"endless", Some(5)),
        (Opcode::Symlink, b"name\0endless", Some(5)),
        (Opcode::Interrupt, &[0; 7], None),
        (Opcode::Lookup, b"", Some(5)),
    ];
    for (opcode, body, unique) in cases {
        let bytes = request(opcode as u32, body);
        assert_eq!(Request::decode(&bytes, FEATURES).unwrap_err().unique, unique, "{opcode:?}");
    }
    let claims_more = with(&WriteIn { size: 4, ..WriteIn::default() }, b"abc");
    assert!(Request::decode(&request(Opcode::Write as u32, &claims_more), FEATURES).is_err());
    let mut longer = request(Opcode::StatFs as u32, b"");
    longer.push(0);
    assert_eq!(Request::decode(&longer, FEATURES).unwrap_err().what, "the length is not the header's");
}

#[test]
fn every_opcode_is_served_or_left_out_on_purpose_and_new_ones_are_unknown() {
    let unserved: Vec<u32> = Opcode::ALL
        .iter()
        .filter(|opcode| {
            let bytes = request(**opcode as u32, &[0; 128]);
            matches!(Request::decode(&bytes, FEATURES).unwrap().call, Call::Unserved(_))
        })
        .map(|opcode| *opcode as u32)
        .collect();
    // ACCESS (the kernel checks), BMAP, IOCTL, POLL, NOTIFY_REPLY (nothing is asked for), DAX.
    assert_eq!(unserved, [34, 37, 39, 40, 41, 44, 48, 49]);
    for number in [0, 7, 19, 54, 4096, u32::MAX] {
        let bytes = request(number, &[0; 128]);
        assert_eq!(Request::decode(&bytes, FEATURES).unwrap().call, Call::Unknown(number));
    }
}

proptest! {
    #[test]
    fn no_bytes_make_decoding_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), ext in any::<bool>()) {
        let _ = Request::decode(&bytes, Features { setxattr_ext: ext, epoch: false });
    }

    /// Bodies that are random behind a header that fits reach every call's own decoding.
    #[test]
    fn no_body_makes_decoding_panic(
        opcode in 0u32..60,
        body in prop::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 0..200),
        extensions in 0u16..30,
    ) {
        let mut bytes = request(opcode, &body);
        bytes[36..38].copy_from_slice(&extensions.to_ne_bytes());
        if let Ok(request) = Request::decode(&bytes, FEATURES) {
            prop_assert_eq!(request.header.len as usize, bytes.len());
            if let Call::Write { arguments, data } = request.call {
                prop_assert_eq!(arguments.size as usize, data.len());
            }
        }
    }
}
