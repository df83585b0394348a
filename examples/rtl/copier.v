// A DMA engine that copies memory, adds up what it copies, and interrupts when it is done.
//
//   0x00 ident     "RTL1"                     0x18 target    address, 64 bits
//   0x04 control   bit 0 start, bit 1         0x20 sum       of the copied words of 32 bits
//                  interrupt enable           0x24 clocks    since reset: how much time has passed in here
//   0x08 status    bit 0 busy; bit 1 done,    0x28 scratch   32 bits
//                  bit 2 error: 1s clear      0x2c on: no register (DECERR)
//   0x0c length    in bytes
//   0x10 source    address, 64 bits           addresses and length: multiples of 8
//
// AXI4-Lite slave for the registers, AXI4 master of 64 bits for memory: bursts of up to 16 beats that cross no 4 KiB.

`timescale 1ns / 1ps
`default_nettype none

module copier (
    input  wire        clk,
    input  wire        rst,

    input  wire [11:0] s_axil_awaddr,
    input  wire        s_axil_awvalid,
    output wire        s_axil_awready,
    input  wire [31:0] s_axil_wdata,
    input  wire [3:0]  s_axil_wstrb,
    input  wire        s_axil_wvalid,
    output wire        s_axil_wready,
    output reg  [1:0]  s_axil_bresp,
    output reg         s_axil_bvalid,
    input  wire        s_axil_bready,
    input  wire [11:0] s_axil_araddr,
    input  wire        s_axil_arvalid,
    output wire        s_axil_arready,
    output reg  [31:0] s_axil_rdata,
    output reg  [1:0]  s_axil_rresp,
    output reg         s_axil_rvalid,
    input  wire        s_axil_rready,

    output wire [63:0] m_axi_araddr,
    output wire [7:0]  m_axi_arlen,
    output wire [2:0]  m_axi_arsize,
    output wire [1:0]  m_axi_arburst,
    output wire        m_axi_arvalid,
    input  wire        m_axi_arready,
    input  wire [63:0] m_axi_rdata,
    input  wire [1:0]  m_axi_rresp,
    input  wire        m_axi_rlast,
    input  wire        m_axi_rvalid,
    output wire        m_axi_rready,
    output wire [63:0] m_axi_awaddr,
    output wire [7:0]  m_axi_awlen,
    output wire [2:0]  m_axi_awsize,
    output wire [1:0]  m_axi_awburst,
    output wire        m_axi_awvalid,
    input  wire        m_axi_awready,
    output wire [63:0] m_axi_wdata,
    output wire [7:0]  m_axi_wstrb,
    output wire        m_axi_wlast,
    output wire        m_axi_wvalid,
    input  wire        m_axi_wready,
    input  wire [1:0]  m_axi_bresp,
    input  wire        m_axi_bvalid,
    output wire        m_axi_bready,

    output wire        busy,
    output wire        irq
);

  localparam [1:0] OKAY = 2'b00, DECERR = 2'b11;
  localparam [2:0] IDLE = 0, PLAN = 1, ASK = 2, FILL = 3, OFFER = 4, DRAIN = 5, CONFIRM = 6;

  reg         irq_enable, done, error, start;
  reg  [31:0] length, sum, clocks, scratch;
  reg  [63:0] source, target;

  // ---- registers --------------------------------------------------------------------------------------------------

  // A write is taken when address and data are both there and the last response has gone.
  wire write = s_axil_awvalid && s_axil_wvalid && !s_axil_bvalid;
  wire read = s_axil_arvalid && !s_axil_rvalid;
  assign s_axil_awready = write;
  assign s_axil_wready = write;
  assign s_axil_arready = read;

  wire [31:0] mask = {{8{s_axil_wstrb[3]}}, {8{s_axil_wstrb[2]}}, {8{s_axil_wstrb[1]}}, {8{s_axil_wstrb[0]}}};
  wire [31:0] set = s_axil_wdata & mask;

  reg finished, failed;  // by the engine, in this clock

  always @(posedge clk) begin
    clocks <= clocks + 1;
    start <= 0;
    if (finished) done <= 1;
    if (failed) error <= 1;
    if (s_axil_bready) s_axil_bvalid <= 0;
    if (s_axil_rready) s_axil_rvalid <= 0;

    if (write) begin
      s_axil_bvalid <= 1;
      s_axil_bresp  <= OKAY;
      case (s_axil_awaddr[11:2])
        10'h00, 10'h08, 10'h09: ;  // read only
        10'h01: begin
          start <= set[0] && !busy;
          if (s_axil_wstrb[0]) irq_enable <= set[1];
        end
        10'h02: begin
          if (set[1]) done <= 0;
          if (set[2]) error <= 0;
        end
        10'h03: length <= length & ~mask | set;
        10'h04: source[31:0] <= source[31:0] & ~mask | set;
        10'h05: source[63:32] <= source[63:32] & ~mask | set;
        10'h06: target[31:0] <= target[31:0] & ~mask | set;
        10'h07: target[63:32] <= target[63:32] & ~mask | set;
        10'h0a: scratch <= scratch & ~mask | set;
        default: s_axil_bresp <= DECERR;
      endcase
    end

    if (read) begin
      s_axil_rvalid <= 1;
      s_axil_rresp  <= OKAY;
      case (s_axil_araddr[11:2])
        10'h00: s_axil_rdata <= 32'h314c5452;
        10'h01: s_axil_rdata <= {30'b0, irq_enable, 1'b0};
        10'h02: s_axil_rdata <= {29'b0, error, done, busy};
        10'h03: s_axil_rdata <= length;
        10'h04: s_axil_rdata <= source[31:0];
        10'h05: s_axil_rdata <= source[63:32];
        10'h06: s_axil_rdata <= target[31:0];
        10'h07: s_axil_rdata <= target[63:32];
        10'h08: s_axil_rdata <= sum;
        10'h09: s_axil_rdata <= clocks;
        10'h0a: s_axil_rdata <= scratch;
        default: begin
          s_axil_rdata <= 0;
          s_axil_rresp <= DECERR;
        end
      endcase
    end

    if (rst) begin
      {irq_enable, done, error, start} <= 0;
      {length, clocks, scratch, source, target} <= 0;
      {s_axil_bvalid, s_axil_bresp, s_axil_rvalid, s_axil_rresp, s_axil_rdata} <= 0;
    end
  end

  // ---- engine -----------------------------------------------------------------------------------------------------

  reg  [2:0]  state;
  reg  [63:0] from, to;
  reg  [28:0] left;        // beats of 8 bytes
  reg  [4:0]  beats;       // of this burst, 1 to 16
  reg  [3:0]  beat;
  reg         bad;         // a beat of this burst had an error
  reg  [63:0] buffer[0:15];

  // How far it may go: 16 beats, what is left, and to the next 4 KiB of either side.
  function [4:0] shorter(input [4:0] a, input [28:0] b);
    shorter = b < a ? b[4:0] : a;
  endfunction
  wire [28:0] from_room = 29'd512 - from[11:3];
  wire [28:0] to_room = 29'd512 - to[11:3];
  wire        last = {1'b0, beat} == beats - 1;

  assign busy = state != IDLE || start;
  assign irq = irq_enable && (done || error);

  assign m_axi_araddr = from;
  assign m_axi_arlen = beats - 1;
  assign m_axi_arsize = 3;
  assign m_axi_arburst = 1;
  assign m_axi_arvalid = state == ASK;
  assign m_axi_rready = state == FILL;
  assign m_axi_awaddr = to;
  assign m_axi_awlen = beats - 1;
  assign m_axi_awsize = 3;
  assign m_axi_awburst = 1;
  assign m_axi_awvalid = state == OFFER;
  assign m_axi_wdata = buffer[beat];
  assign m_axi_wstrb = 8'hff;
  assign m_axi_wlast = last;
  assign m_axi_wvalid = state == DRAIN;
  assign m_axi_bready = state == CONFIRM;

  always @(posedge clk) begin
    finished <= 0;
    failed <= 0;
    case (state)
      IDLE:
      if (start) begin
        from <= source;
        to <= target;
        left <= length[31:3];
        sum <= 0;
        if (length == 0 || length[2:0] != 0 || source[2:0] != 0 || target[2:0] != 0) failed <= 1;
        else state <= PLAN;
      end
      PLAN: begin
        beats <= shorter(shorter(shorter(5'd16, left), from_room), to_room);
        beat <= 0;
        bad <= 0;
        state <= ASK;
      end
      ASK: if (m_axi_arready) state <= FILL;
      FILL:
      if (m_axi_rvalid) begin
        buffer[beat] <= m_axi_rdata;
        sum <= sum + m_axi_rdata[31:0] + m_axi_rdata[63:32];
        beat <= last ? 0 : beat + 1;
        bad <= bad || m_axi_rresp != OKAY;
        if (m_axi_rlast) begin
          if (bad || m_axi_rresp != OKAY) begin
            failed <= 1;
            state  <= IDLE;
          end else state <= OFFER;
        end
      end
      OFFER: if (m_axi_awready) state <= DRAIN;
      DRAIN:
      if (m_axi_wready) begin
        beat <= last ? 0 : beat + 1;
        if (last) state <= CONFIRM;
      end
      CONFIRM:
      if (m_axi_bvalid) begin
        from <= from + {beats, 3'b0};
        to   <= to + {beats, 3'b0};
        left <= left - beats;
        if (m_axi_bresp != OKAY) begin
          failed <= 1;
          state  <= IDLE;
        end else if (left == beats) begin
          finished <= 1;
          state <= IDLE;
        end else state <= PLAN;
      end
      default: state <= IDLE;
    endcase
    if (rst) begin
      state <= IDLE;
      sum   <= 0;
    end
  end
endmodule

`default_nettype wire
