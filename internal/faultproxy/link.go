package faultproxy

import (
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// link is a client's connection with the one to the server that stands for it.
type link struct {
	proxy          *Proxy
	id             int
	client, server net.Conn
	vanished       atomic.Bool // nothing is forwarded any more, nor is its end
	once           sync.Once
	over           chan struct{} // closed at its end
}

// reset ends both connections by RST.
func (l *link) reset() { l.end(func(conn net.Conn) { reset(conn) }) }

func (l *link) end(how func(net.Conn)) {
	l.once.Do(func() {
		close(l.over)
		how(l.client)
		how(l.server)
	})
}

func reset(conn net.Conn) {
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // then Close sends RST
	}
	conn.Close()
}

// pump forwards one direction until the link ends.
func (l *link) pump(from, to net.Conn, fromClient bool) {
	frames := splitter{protocol: l.proxy.protocol, started: !fromClient}
	buffer := make([]byte, 64<<10)
	for {
		n, err := from.Read(buffer)
		if n > 0 && !l.pass(to, fromClient, frames.split(buffer[:n])) {
			l.reset()
			return
		}
		if err != nil {
			if l.vanished.Load() {
				<-l.over // the other side does not hear of it
			}
			l.end(func(conn net.Conn) { conn.Close() })
			return
		}
	}
}

// pass does with frames what it is told to, and writes together what goes on. It returns
// false if the link is to be cut.
func (l *link) pass(to net.Conn, fromClient bool, frames [][]byte) bool {
	var out []byte
	for _, frame := range frames {
		action := Forward
		if _, _, intercept := l.proxy.now(); intercept != nil {
			action = intercept(Frame{Link: l.id, FromClient: fromClient, Bytes: frame})
		}
		switch {
		case action == Drop:
			continue
		case action == CutBefore:
			l.forward(to, out)
			return false
		case action == CutAfter:
			l.forward(to, append(out, frame...))
			return false
		case action.delay > 0:
			if !l.forward(to, out) || !l.wait(action.delay) {
				return false
			}
			out = nil
		}
		out = append(out, frame...)
	}
	return l.forward(to, out)
}

func (l *link) forward(to net.Conn, b []byte) bool {
	if len(b) == 0 {
		return true
	}
	for {
		fault, changed, _ := l.proxy.now()
		if fault.stall {
			select {
			case <-changed:
				continue
			case <-l.over:
				return false
			}
		}
		if fault.rate > 0 && !l.wait(time.Duration(len(b))*time.Second/time.Duration(fault.rate)) {
			return false
		}
		break
	}
	if l.vanished.Load() {
		return true
	}
	n, cut := l.proxy.spend(len(b))
	_, err := to.Write(b[:n])
	return err == nil && !cut
}

// wait returns false if the link ended meanwhile.
func (l *link) wait(d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-l.over:
		return false
	}
}
