package rabbit

import (
	"errors"
	"net"
	"os"
	"sync"
	"time"
)

// gatherConn lets one goroutine write what others hand over: what comes while it
// writes goes out with its next write. The client flushes after each message, so
// that a thousand small ones were a thousand system calls here and as many small
// reads at the broker. Each write has a deadline: without it a peer that stops
// reading holds the client for ever, heartbeats or not.
type gatherConn struct {
	net.Conn
	timeout time.Duration
	ended   chan struct{} // closed when nothing more is written

	mu      sync.Mutex
	changed sync.Cond // of what follows
	buffer  []byte
	closing bool
	blocked bool // the peer has said that it does not read: no write is late
	err     error
}

// gatherBytes bounds what is handed over and not yet written.
const gatherBytes = 256 << 10

// goodbye is how long Close waits for what was handed over to be written.
const goodbye = time.Second

func newGatherConn(raw net.Conn, timeout time.Duration) *gatherConn {
	c := &gatherConn{Conn: raw, timeout: timeout, ended: make(chan struct{})}
	c.changed.L = &c.mu
	go c.write()
	return c
}

// Write hands b over. It waits while too much is; an error of an earlier write is
// returned by all that follow.
func (c *gatherConn) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.err == nil && len(c.buffer) > 0 && len(c.buffer)+len(b) > gatherBytes {
		c.changed.Wait()
	}
	if c.closing && c.err == nil {
		return 0, net.ErrClosed
	}
	if c.err != nil {
		return 0, c.err
	}
	c.buffer = append(c.buffer, b...)
	c.changed.Broadcast()
	return len(b), nil
}

// write writes until Close or an error, which closes the connection.
func (c *gatherConn) write() {
	defer close(c.ended)
	var out []byte
	for {
		c.mu.Lock()
		for len(c.buffer) == 0 && !c.closing {
			c.changed.Wait()
		}
		out, c.buffer = c.buffer, out[:0]
		c.changed.Broadcast()
		c.mu.Unlock()
		if len(out) == 0 {
			return
		}
		if err := c.writeAll(out); err != nil {
			c.Conn.Close()
			c.mu.Lock()
			c.err = err
			c.changed.Broadcast()
			c.mu.Unlock()
			return
		}
		if cap(out) > 2*gatherBytes {
			out = nil // of a large message
		}
	}
}

func (c *gatherConn) writeAll(b []byte) error {
	for {
		if err := c.SetWriteDeadline(time.Now().Add(c.timeout)); err != nil {
			return err
		}
		n, err := c.Conn.Write(b)
		b = b[n:]
		c.mu.Lock()
		waits := c.blocked && errors.Is(err, os.ErrDeadlineExceeded)
		c.mu.Unlock()
		if !waits {
			return err
		}
	}
}

// setBlocked says whether the peer has announced that it does not read.
func (c *gatherConn) setBlocked(blocked bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.blocked = blocked
}

// cut closes the connection without waiting for anybody.
func (c *gatherConn) cut() {
	c.Conn.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closing = true
	c.changed.Broadcast()
}

// Close writes what was handed over, unless the peer does not read, and closes the
// connection.
func (c *gatherConn) Close() error {
	c.mu.Lock()
	c.closing = true
	c.changed.Broadcast()
	c.mu.Unlock()
	timer := time.AfterFunc(goodbye, func() { c.Conn.Close() })
	defer timer.Stop()
	<-c.ended
	return c.Conn.Close()
}
