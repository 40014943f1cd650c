//! The XDP program: sixty lines of documentation around 27 instructions. It stamps each frame of our EtherType with the time and hands it to
//! the socket of the queue on which it came; everything else goes its way.
//!
//! Knows the kernel's instruction set (Documentation/bpf/standardization/instruction-set.rst) and the first fourteen bytes of a frame. Loaded
//! once when a link is opened.

/// One instruction: struct bpf_insn (linux/bpf.h).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Instruction {
    code: u8,
    /// Destination in the low four bits, source in the high ones.
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// Registers. A call takes R1 to R5, gives R0, and leaves nothing of R1 to R5; R6 to R9 outlive it.
const R0: u8 = 0;
const R1: u8 = 1;
const R2: u8 = 2;
const R3: u8 = 3;
const R4: u8 = 4;
const R6: u8 = 6;

/// Fields of struct xdp_md.
const DATA: i16 = 0;
const DATA_END: i16 = 4;
const DATA_META: i16 = 8;
const QUEUE: i16 = 16;

/// Helper functions (enum bpf_func_id).
const KTIME_GET_NS: i32 = 5;
const REDIRECT_MAP: i32 = 51;
const XDP_ADJUST_META: i32 = 54;

/// What a program answers (enum xdp_action): let the frame pass to the stack.
const XDP_PASS: i32 = 2;
/// An immediate that names a map by its descriptor (BPF_PSEUDO_MAP_FD).
const MAP_BY_FD: u8 = 1;

/// Where a frame has its EtherType, and where it ends.
const ETHERTYPE_AT: i16 = 12;
const HEADER_END: i32 = 14;

/// Bytes before a frame in which the program puts the time at which it came, in nanoseconds of CLOCK_MONOTONIC.
pub(super) const STAMP_BYTES: usize = 8;

const fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers: from << 4 | to, offset, immediate }
}

/// `to = from` (BPF_ALU64 | BPF_MOV | BPF_X).
const fn copy(to: u8, from: u8) -> Instruction {
    instruction(0xbf, to, from, 0, 0)
}

/// `to = value` (BPF_ALU64 | BPF_MOV | BPF_K).
const fn set(to: u8, value: i32) -> Instruction {
    instruction(0xb7, to, 0, 0, value)
}

/// `to += value` (BPF_ALU64 | BPF_ADD | BPF_K).
const fn add(to: u8, value: i32) -> Instruction {
    instruction(0x07, to, 0, 0, value)
}

/// `to = *(u32 *)(from + offset)` (BPF_LDX | BPF_MEM | BPF_W).
const fn load_word(to: u8, from: u8, offset: i16) -> Instruction {
    instruction(0x61, to, from, offset, 0)
}

/// `to = *(u16 *)(from + offset)` (BPF_LDX | BPF_MEM | BPF_H).
const fn load_half(to: u8, from: u8, offset: i16) -> Instruction {
    instruction(0x69, to, from, offset, 0)
}

/// `*(u64 *)(to + offset) = from` (BPF_STX | BPF_MEM | BPF_DW).
const fn store_double(to: u8, from: u8, offset: i16) -> Instruction {
    instruction(0x7b, to, from, offset, 0)
}

/// Skips `over` instructions if `left > right` (BPF_JMP | BPF_JGT | BPF_X).
const fn skip_if_greater(left: u8, right: u8, over: i16) -> Instruction {
    instruction(0x2d, left, right, over, 0)
}

/// Skips `over` instructions if `left != value` (BPF_JMP | BPF_JNE | BPF_K).
const fn skip_if_not(left: u8, value: i32, over: i16) -> Instruction {
    instruction(0x55, left, 0, over, value)
}

/// Calls a helper function (BPF_JMP | BPF_CALL).
const fn call(function: i32) -> Instruction {
    instruction(0x85, 0, 0, 0, function)
}

/// Ends with the answer in R0 (BPF_JMP | BPF_EXIT).
const fn exit() -> Instruction {
    instruction(0x95, 0, 0, 0, 0)
}

/// The program for frames of `ethertype`, which go to the sockets of the map with the descriptor `map`.
///
/// A card or driver that has no room before a frame gives no stamp; the frame counts as come when it is looked at. A queue without a socket in
/// the map lets its frames pass, as does an interface on which a daemon is about to start or end.
pub(super) const fn frames_of(ethertype: u16, map: i32) -> [Instruction; 27] {
    [
        // The frame's context outlives calls; data and data_end of its first buffer, in which the whole header lies.
        copy(R6, R1),
        load_word(R2, R6, DATA),
        load_word(R3, R6, DATA_END),
        // Not ours if it ends within the header: to `pass`.
        copy(R4, R2),
        add(R4, HEADER_END),
        skip_if_greater(R4, R3, 19),
        // Not ours if it has another EtherType, which lies there in network order: to `pass`.
        load_half(R4, R2, ETHERTYPE_AT),
        skip_if_not(R4, ethertype.to_be() as i32, 17),
        // Room for the stamp before the frame, or to `redirect` without one.
        copy(R1, R6),
        set(R2, -(STAMP_BYTES as i32)),
        call(XDP_ADJUST_META),
        skip_if_not(R0, 0, 7),
        // R0 = now.
        call(KTIME_GET_NS),
        // The room lies from data_meta to data; the verifier wants that compared before it is written to.
        load_word(R2, R6, DATA_META),
        load_word(R3, R6, DATA),
        copy(R4, R2),
        add(R4, STAMP_BYTES as i32),
        skip_if_greater(R4, R3, 1),
        store_double(R2, R0, 0),
        // redirect: the socket of this queue, or, where there is none, pass. The map's address takes two instructions (BPF_LD | BPF_IMM | BPF_DW).
        load_word(R2, R6, QUEUE),
        instruction(0x18, R1, MAP_BY_FD, 0, map),
        instruction(0, 0, 0, 0, 0),
        set(R3, XDP_PASS),
        call(REDIRECT_MAP),
        exit(),
        // pass:
        set(R0, XDP_PASS),
        exit(),
    ]
}

const _: () = assert!(size_of::<Instruction>() == 8, "struct bpf_insn");
