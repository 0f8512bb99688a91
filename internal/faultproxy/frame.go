package faultproxy

import (
	"bytes"
	"encoding/binary"
	"time"
)

// Protocol is what a proxy's links speak.
type Protocol int

const (
	Raw        Protocol = iota // pieces as they come
	PostgreSQL                 // version 3, without TLS
	AMQP                       // 0-9-1, without TLS
)

// Frame is a message of PostgreSQL's protocol, a frame of AMQP's, or some bytes.
type Frame struct {
	Link       int // of the proxy, from 1
	FromClient bool
	Bytes      []byte // whole; not to be kept
}

// Action is what becomes of a frame.
type Action struct {
	kind  int
	delay time.Duration
}

var (
	Forward   = Action{}
	Drop      = Action{kind: 1}
	CutBefore = Action{kind: 2} // the link is reset, the frame not forwarded
	CutAfter  = Action{kind: 3} // it is forwarded first
)

// Delay forwards the frame, and what comes behind it, so much later.
func Delay(d time.Duration) Action { return Action{delay: d} }

// IsCommit reports whether a client sends COMMIT in PostgreSQL's simple protocol, as
// pgx.Tx does.
func (f Frame) IsCommit() bool {
	return f.FromClient && len(f.Bytes) > 5 && f.Bytes[0] == 'Q' && bytes.EqualFold(f.Bytes[5:], []byte("commit\x00"))
}

// IsCommitted reports whether PostgreSQL says that a COMMIT is done.
func (f Frame) IsCommitted() bool {
	return !f.FromClient && len(f.Bytes) > 5 && f.Bytes[0] == 'C' && string(f.Bytes[5:]) == "COMMIT\x00"
}

// Methods of AMQP, as class and method number; amqp0-9-1.xml.
const (
	BasicPublish = 60<<16 | 40
	BasicReturn  = 60<<16 | 50
	BasicDeliver = 60<<16 | 60
	BasicAck     = 60<<16 | 80
	BasicNack    = 60<<16 | 120
)

// Method returns the method that an AMQP frame begins, 0 for a frame of another kind.
func (f Frame) Method() uint32 {
	if len(f.Bytes) < 12 || f.Bytes[0] != 1 {
		return 0
	}
	return binary.BigEndian.Uint32(f.Bytes[7:])
}

// splitter cuts a stream into frames.
type splitter struct {
	protocol Protocol
	started  bool // what only begins a stream has come
	buffer   []byte
	rest     []byte // of buffer, the beginning of a frame
}

// split returns the frames that b completes. They are good until it is called again.
func (s *splitter) split(b []byte) (frames [][]byte) {
	if s.protocol == Raw {
		return [][]byte{b}
	}
	s.buffer = append(s.buffer[:copy(s.buffer, s.rest)], b...)
	s.rest = s.buffer
	for {
		n := s.next(s.rest)
		if n == 0 || n > len(s.rest) {
			return frames
		}
		frames = append(frames, s.rest[:n])
		s.rest, s.started = s.rest[n:], true
	}
}

// next returns the length of the frame that b begins with, 0 if that is not known yet.
func (s *splitter) next(b []byte) int {
	switch {
	case s.protocol == AMQP && !s.started:
		return 8 // "AMQP" and the version
	case s.protocol == AMQP && len(b) >= 7:
		return 7 + int(binary.BigEndian.Uint32(b[3:])) + 1
	case s.protocol == PostgreSQL && !s.started && len(b) >= 4:
		return int(binary.BigEndian.Uint32(b)) // StartupMessage has no type
	case s.protocol == PostgreSQL && s.started && len(b) >= 5:
		return 1 + int(binary.BigEndian.Uint32(b[1:]))
	}
	return 0
}
