//! The pickle machine against what is not torch's: every refusal by name, and no bomb goes off.

use super::*;

fn fault(bytes: &[u8]) -> Fault {
    load(bytes, Unlisted::Refused).map(|(pickle, _)| pickle.describe(pickle.root())).expect_err("read")
}

#[track_caller]
fn refused(bytes: &[u8], what: &str) {
    let fault = fault(bytes);
    assert!(fault.refused && fault.what.contains(what), "{fault:?}");
}

#[track_caller]
fn damaged(bytes: &[u8], what: &str) {
    let fault = fault(bytes);
    assert!(!fault.refused && fault.what.contains(what), "{fault:?}");
}

#[test]
fn a_class_that_is_not_on_the_list_is_refused_by_name() {
    refused(b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.", "os.system");
    refused(b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "os.system");
    refused(b"\x80\x02c__builtin__\neval\n.", "__builtin__.eval");
    refused(b"\x80\x02ctorch\nload\n.", "torch.load");
}

#[test]
fn members_of_enumerations_are_found_by_name_or_value_and_nothing_else_is_found_so() {
    const BY_NAME: &[u8] = b"\x80\x02c__builtin__\ngetattr\nctorch.distributed.checkpoint.metadata\n\
        _MEM_FORMAT_ENCODING\nX\x10\x00\x00\x00TORCH_CONTIGUOUS\x86R.";
    const BY_VALUE: &[u8] =
        b"\x80\x02ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\nK\x00\x85R.";
    for member in [BY_NAME, BY_VALUE] {
        let (pickle, _) = load(member, Unlisted::Refused).unwrap();
        assert!(pickle.made(pickle.root(), Class::MemFormatEncoding).is_some());
    }
    refused(b"\x80\x02c__builtin__\ngetattr\nctorch\nSize\nX\x05\x00\x00\x00count\x86R.", "getattr");
    refused(b"\x80\x02c__builtin__\ngetattr\nX\x01\x00\x00\x00aX\x05\x00\x00\x00count\x86R.", "getattr");
}

#[test]
fn opcodes_and_protocols_that_torch_does_not_write_are_refused() {
    refused(b"\x80\x06N.", "protocol 6");
    refused(b"\x80\x01N.", "protocol 1");
    refused(b"\x80\x02I5\n.", "0x49");
    refused(b"\x80\x02\x82\x05.", "0x82");
}

#[test]
fn lengths_that_lie_are_damage_and_allocate_nothing() {
    damaged(b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.", "are left");
    damaged(b"\x80\x02X\xff\xff\xff\xffabc.", "are left");
    damaged(b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7fN.", "a frame");
    damaged(b"\x80\x02X\x02\x00\x00\x00\xc3\x28.", "UTF-8");
    damaged(b"\x80\x02\x8b\xff\xff\xff\x7f.", "are left");
}

#[test]
fn stacks_marks_and_memos_that_do_not_match_are_damage() {
    damaged(b"\x80\x02.", "an empty stack");
    damaged(b"\x80\x02(.", "an empty stack");
    damaged(b"\x80\x02Nt.", "without a mark");
    damaged(b"\x80\x02N(\x85.", "an empty stack");
    damaged(b"\x80\x02h\x07.", "memo 7");
    damaged(b"\x80\x02}(K\x01u.", "a key without a value");
    damaged(b"\x80\x02NNa.", "no list");
    damaged(b"\x80\x02N)R.", "no class");
    damaged(b"\x80\x02K", "are left");
}

#[test]
fn nesting_and_cycles_cost_no_stack() {
    let mut deep = b"\x80\x02".to_vec();
    deep.extend(std::iter::repeat_n(b']', 200_000));
    deep.extend(std::iter::repeat_n(b'a', 199_999));
    deep.push(b'.');
    let (pickle, taken) = load(&deep, Unlisted::Refused).unwrap();
    assert_eq!(taken, deep.len());
    drop(pickle);
    // l = []; l.append(l)
    let (pickle, _) = load(b"\x80\x02]q\x00h\x00a.", Unlisted::Refused).unwrap();
    assert_eq!(pickle.items(pickle.root()).map(<[Item]>::len), Some(1));
}

#[test]
fn a_memo_that_jumps_ahead_costs_one_entry() {
    let (pickle, _) = load(b"\x80\x02Nr\xff\xff\xff\xffj\xff\xff\xff\xff\x86.", Unlisted::Refused).unwrap();
    assert_eq!(pickle.items(pickle.root()), Some(&[Item::None, Item::None][..]));
}

#[test]
fn copies_of_copies_are_refused() {
    let mut bomb = b"\x80\x02](".to_vec();
    bomb.extend(std::iter::repeat_n(b'N', 10_000));
    bomb.extend_from_slice(b"eq\x000");
    for _ in 0..10_000 {
        bomb.extend_from_slice(b"c__builtin__\nset\nh\x00\x85R0");
    }
    bomb.extend_from_slice(b"N.");
    refused(&bomb, "copies of copies");
}

#[test]
fn integers_of_every_length_are_read() {
    let int = |bytes: &[u8]| {
        let pickle = [&b"\x80\x02"[..], bytes, b"."].concat();
        load(&pickle, Unlisted::Refused).map(|(pickle, _)| pickle.root()).unwrap()
    };
    assert_eq!(int(b"J\xff\xff\xff\xff"), Item::Int(-1));
    assert_eq!(int(b"\x8a\x00"), Item::Int(0));
    assert_eq!(int(b"\x8a\x01\xff"), Item::Int(-1));
    assert_eq!(int(b"\x8a\x02\xff\x00"), Item::Int(255));
    assert_eq!(int(b"\x8a\x08\x00\x00\x00\x00\x00\x00\x00\x80"), Item::Int(i64::MIN));
    assert_eq!(int(b"\x8a\x09\xff\xff\xff\xff\xff\xff\xff\x7f\x00"), Item::Int(i64::MAX));
    assert!(matches!(int(b"\x8a\x09\xff\xff\xff\xff\xff\xff\xff\xff\x00"), Item::BigInt(_)));
}

#[test]
fn what_the_writer_writes_is_read_as_it_was() {
    let mut writer = Writer::new();
    writer.begin_list();
    writer.int(i64::MIN);
    writer.int(70_000);
    writer.float(f64::NEG_INFINITY);
    writer.str("größer");
    writer.str("größer");
    writer.bytes(&[0, 127, 128, 255]);
    writer.end_list();
    let bytes = writer.finish();
    let (pickle, _) = load(&bytes, Unlisted::Refused).unwrap();
    let items = pickle.items(pickle.root()).unwrap();
    assert_eq!(items[..3], [Item::Int(i64::MIN), Item::Int(70_000), Item::Float(f64::NEG_INFINITY)]);
    assert_eq!((pickle.str(items[3]), pickle.str(items[4])), (Some("größer"), Some("größer")));
    assert_eq!(pickle.bytes(items[5]), Some(&[0, 127, 128, 255][..]));
}
