use super::*;

const REQUEST: Request = Request { operation: "write", offset: 4096, length: 8192 };

#[test]
fn a_completion_is_success_a_status_or_what_the_kernel_says() {
    assert_eq!(Failure::of(Ok(0)), Ok(()));
    let unrecovered = Failure::of(Ok(0x4281)).unwrap_err();
    assert_eq!(unrecovered, Failure::Status(Status(0x4281)));
    assert_eq!(Failure::of(Err(Errno::NODEV)), Err(Failure::Refused(Errno::NODEV)));
    let told = |failure: Failure| failure.told("/dev/ng0n1", REQUEST);
    assert_eq!(told(Failure::Refused(Errno::NODEV)), DeviceError::Gone { device: "/dev/ng0n1".to_owned() });
    assert_eq!(
        told(unrecovered).to_string(),
        "device /dev/ng0n1: write of 8192 bytes at 4096 failed: unrecovered read error (type 0x2, code 0x81)"
    );
    let text = told(Failure::Refused(Errno::INTR)).to_string();
    assert!(text.ends_with("it was not answered, also not after a reset"), "{text}");
}

#[test]
fn what_a_reset_or_a_lost_path_ended_is_sent_again_and_what_failed_for_good_is_not() {
    let retries = |status| Failure::Status(Status(status)).retries_max();
    // Host path error, aborted by the host, namespace not ready.
    let may_succeed = [(0x370, RETRIES_ON_THE_WAY), (0x371, RETRIES_ON_THE_WAY), (0x82, RETRIES_BY_CONTROLLER)];
    for (status, most) in may_succeed {
        assert_eq!((retries(status), retries(status | 0x4000)), (most, 0), "{status:#x}, and do not retry");
    }
    assert_eq!([0x01, 0x80, 0x281].map(retries), [0; 3]);
    let retries = |errno| Failure::Refused(errno).retries_max();
    assert_eq!([Errno::INTR, Errno::AGAIN, Errno::NODEV].map(retries), [RETRIES_BY_RESET, RETRIES_ON_THE_WAY, 0]);
    // What Linux says where multipath is on and no controller is ready.
    assert_eq!(retries(Errno::INVAL), RETRIES_ON_THE_WAY);
    let on_the_way = [Errno::INTR, Errno::NODEV, Errno::IO].map(|errno| Failure::Refused(errno).is_on_the_way());
    assert_eq!(on_the_way, [false; 3]);
    assert!(Failure::Status(Status(0x370)).is_on_the_way() && !Failure::Status(Status(0x82)).is_on_the_way());
}
