// objc_msgSend and its variants: find the method, then jump to it with every argument register as it was.
//
// A message to nil returns zero in all result registers. The callers of _stret zero the memory themselves. An exception
// passes these frames only after they are gone (the method is jumped to), so the unwind rules serve debuggers.

#if defined(__x86_64__)

.text

// receiver and selector: the argument registers that hold them; lookup: the C function that finds the method.
.macro SEND name, receiver, selector, lookup
.globl \name
.hidden \name
.type \name, @function
.p2align 4
\name:
  .cfi_startproc
  testq %\receiver, %\receiver
  je 1f
  pushq %rbp
  .cfi_def_cfa_offset 16
  .cfi_offset %rbp, -16
  movq %rsp, %rbp
  .cfi_def_cfa_register %rbp
  subq $192, %rsp
  movups %xmm0, (%rsp)
  movups %xmm1, 16(%rsp)
  movups %xmm2, 32(%rsp)
  movups %xmm3, 48(%rsp)
  movups %xmm4, 64(%rsp)
  movups %xmm5, 80(%rsp)
  movups %xmm6, 96(%rsp)
  movups %xmm7, 112(%rsp)
  movq %rdi, 128(%rsp)
  movq %rsi, 136(%rsp)
  movq %rdx, 144(%rsp)
  movq %rcx, 152(%rsp)
  movq %r8, 160(%rsp)
  movq %r9, 168(%rsp)
  movq %rax, 176(%rsp)
  movq %\selector, %r11
  movq %\receiver, %rdi
  movq %r11, %rsi
  call \lookup
  movq %rax, %r11
  movups (%rsp), %xmm0
  movups 16(%rsp), %xmm1
  movups 32(%rsp), %xmm2
  movups 48(%rsp), %xmm3
  movups 64(%rsp), %xmm4
  movups 80(%rsp), %xmm5
  movups 96(%rsp), %xmm6
  movups 112(%rsp), %xmm7
  movq 128(%rsp), %rdi
  movq 136(%rsp), %rsi
  movq 144(%rsp), %rdx
  movq 152(%rsp), %rcx
  movq 160(%rsp), %r8
  movq 168(%rsp), %r9
  movq 176(%rsp), %rax
  leave
  .cfi_def_cfa %rsp, 8
.endm

.macro END name
  .cfi_endproc
  .size \name, . - \name
.endm

.hidden objc_lookup
.hidden objc_lookup_super

SEND objc_msgSend, rdi, rsi, objc_lookup
  jmp *%r11
1:
  xorl %eax, %eax
  xorl %edx, %edx
  xorps %xmm0, %xmm0
  xorps %xmm1, %xmm1
  ret
END objc_msgSend

// The address of the result comes first, the receiver second.
SEND objc_msgSend_stret, rsi, rdx, objc_lookup
  jmp *%r11
1:
  movq %rdi, %rax
  ret
END objc_msgSend_stret

// The receiver is the first word of struct objc_super, which is never null.
SEND objc_msgSendSuper2, rdi, rsi, objc_lookup_super
  movq (%rdi), %rdi
  jmp *%r11
1:
  ud2
END objc_msgSendSuper2

SEND objc_msgSendSuper2_stret, rsi, rdx, objc_lookup_super
  movq (%rsi), %rsi
  jmp *%r11
1:
  ud2
END objc_msgSendSuper2_stret

#elif defined(__aarch64__)

.text

// x0 receiver, x1 selector, x0 to x7 and q0 to q7 arguments, x8 the address of a large result.
.macro SEND name, lookup
.globl \name
.hidden \name
.type \name, %function
.p2align 2
\name:
  .cfi_startproc
  cbz x0, 1f
  stp x29, x30, [sp, #-224]!
  .cfi_def_cfa_offset 224
  .cfi_offset x29, -224
  .cfi_offset x30, -216
  mov x29, sp
  .cfi_def_cfa_register x29
  stp q0, q1, [sp, #16]
  stp q2, q3, [sp, #48]
  stp q4, q5, [sp, #80]
  stp q6, q7, [sp, #112]
  stp x0, x1, [sp, #144]
  stp x2, x3, [sp, #160]
  stp x4, x5, [sp, #176]
  stp x6, x7, [sp, #192]
  str x8, [sp, #208]
  bl \lookup
  mov x17, x0
  ldp q0, q1, [sp, #16]
  ldp q2, q3, [sp, #48]
  ldp q4, q5, [sp, #80]
  ldp q6, q7, [sp, #112]
  ldp x0, x1, [sp, #144]
  ldp x2, x3, [sp, #160]
  ldp x4, x5, [sp, #176]
  ldp x6, x7, [sp, #192]
  ldr x8, [sp, #208]
  ldp x29, x30, [sp], #224
  .cfi_def_cfa sp, 0
  .cfi_restore x29
  .cfi_restore x30
.endm

.macro END name
  .cfi_endproc
  .size \name, . - \name
.endm

.hidden objc_lookup
.hidden objc_lookup_super

SEND objc_msgSend, objc_lookup
  br x17
1:
  mov x1, #0
  movi d0, #0
  movi d1, #0
  movi d2, #0
  movi d3, #0
  ret
END objc_msgSend

// The receiver is the first word of struct objc_super, which is never null.
SEND objc_msgSendSuper2, objc_lookup_super
  ldr x0, [x0]
  br x17
1:
  brk #1
END objc_msgSendSuper2

#else
#error "objc_msgSend is written for x86-64 and arm64 only"
#endif

.section .note.GNU-stack, "", %progbits
