package faultproxy

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"sync"
	"time"
)

// Proxy forwards connections to one server.
type Proxy struct {
	target, address string
	protocol        Protocol
	tasks           sync.WaitGroup

	mu        sync.Mutex
	listener  net.Listener // nil while Refuse holds
	closed    bool
	links     map[*link]bool
	serial    int
	fault     fault
	changed   chan struct{} // closed when fault is another
	budget    int64         // bytes until the link that sends them is cut; 0: no such order
	intercept func(Frame) Action
}

// fault is what holds for all links.
type fault struct {
	vanish, stall bool
	rate          int // bytes a second and direction; 0: no limit
}

// New listens on a free port of loopback, and forwards to target, a host with port.
func New(target string, protocol Protocol) (*Proxy, error) {
	p := &Proxy{target: target, protocol: protocol, links: make(map[*link]bool), changed: make(chan struct{})}
	if err := p.listen("127.0.0.1:0"); err != nil {
		return nil, err
	}
	return p, nil
}

// listen is called with mu held, or before anybody else knows p.
func (p *Proxy) listen(address string) error {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	p.listener, p.address = listener, listener.Addr().String()
	p.tasks.Go(func() { p.accept(listener) })
	return nil
}

// Address is where the proxy listens, as host and port.
func (p *Proxy) Address() string { return p.address }

// URL is a URL of the server with the proxy's address in place of the server's.
func (p *Proxy) URL(server string) string {
	u, err := url.Parse(server)
	if err != nil {
		panic("faultproxy: " + errors.Unwrap(err).Error()) // without the URL, which has a password
	}
	u.Host = p.address
	return u.String()
}

// Close ends all links and waits for what serves them.
func (p *Proxy) Close() {
	p.mu.Lock()
	p.closed = true
	if p.listener != nil {
		p.listener.Close()
	}
	p.set(fault{})
	p.cut()
	p.mu.Unlock()
	p.tasks.Wait()
}

// Refuse cuts all links and has the kernel refuse new ones.
func (p *Proxy) Refuse() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.listener != nil {
		p.listener.Close()
		p.listener = nil
	}
	p.cut()
}

// Vanish makes a black hole of the way between client and server: what one sends never
// reaches the other, and neither hears that. Heal does not heal the links that there are.
func (p *Proxy) Vanish() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.set(fault{vanish: true})
	for l := range p.links {
		l.vanished.Store(true)
	}
}

// Stall stops reading, so that buffers fill up. All is delivered after Heal.
func (p *Proxy) Stall() { p.order(fault{stall: true}) }

// Slow forwards that many bytes a second of each link and direction.
func (p *Proxy) Slow(bytesPerSecond int) { p.order(fault{rate: bytesPerSecond}) }

func (p *Proxy) order(f fault) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.set(f)
}

// Heal ends every fault, also those that are yet to come by CutAfter and Intercept.
func (p *Proxy) Heal() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.set(fault{})
	p.budget, p.intercept = 0, nil
	if p.listener == nil && !p.closed {
		if err := p.listen(p.address); err != nil {
			return fmt.Errorf("listen again: %w", err)
		}
	}
	return nil
}

// set is called with mu held.
func (p *Proxy) set(f fault) {
	p.fault = f
	close(p.changed)
	p.changed = make(chan struct{})
}

// Cut resets all links: both sides get RST.
func (p *Proxy) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cut()
}

// cut is called with mu held.
func (p *Proxy) cut() {
	for l := range p.links {
		l.reset()
	}
}

// CutAfter resets one link, whichever it is, after exactly n more bytes were forwarded, in
// both directions and on all links together.
func (p *Proxy) CutAfter(n int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.budget = n
}

// Intercept has fn decide on each message that comes from now on, by one link and direction
// at a time in the order in which they come. fn may be called by several at once.
func (p *Proxy) Intercept(fn func(Frame) Action) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.intercept = fn
}

// Links returns how many there are.
func (p *Proxy) Links() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.links)
}

func (p *Proxy) accept(listener net.Listener) {
	for {
		client, err := listener.Accept()
		if err != nil {
			return
		}
		p.tasks.Go(func() { p.serve(client) })
	}
}

// dialTimeout bounds what a server on loopback needs to be there.
const dialTimeout = 5 * time.Second

func (p *Proxy) serve(client net.Conn) {
	server, err := net.DialTimeout("tcp", p.target, dialTimeout)
	if err != nil {
		reset(client)
		return
	}
	l := &link{proxy: p, client: client, server: server, over: make(chan struct{})}
	if !p.register(l) {
		l.reset()
		return
	}
	var pumps sync.WaitGroup
	pumps.Go(func() { l.pump(client, server, true) })
	pumps.Go(func() { l.pump(server, client, false) })
	pumps.Wait()
	p.mu.Lock()
	delete(p.links, l)
	p.mu.Unlock()
}

// register reports whether links are wanted.
func (p *Proxy) register(l *link) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || p.listener == nil {
		return false
	}
	p.serial++
	l.id = p.serial
	l.vanished.Store(p.fault.vanish)
	p.links[l] = true
	return true
}

// spend takes up to n bytes from what CutAfter left, and reports whether the link is to be
// cut after them.
func (p *Proxy) spend(n int) (allowed int, cut bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.budget == 0 {
		return n, false
	}
	if int64(n) < p.budget {
		p.budget -= int64(n)
		return n, false
	}
	allowed, p.budget = int(p.budget), 0
	return allowed, true
}

// now returns the fault that holds, what tells of another, and who decides on messages.
func (p *Proxy) now() (fault, <-chan struct{}, func(Frame) Action) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.fault, p.changed, p.intercept
}

// HostOf returns host and port of a server's URL.
func HostOf(server string) (string, error) {
	u, err := url.Parse(server)
	if err != nil {
		return "", errors.New("malformed URL")
	}
	return u.Host, nil
}
