package inbox

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/txbox/txbox/internal/dbschema"
	"github.com/txbox/txbox/internal/rabbit"
	"github.com/txbox/txbox/internal/wire"
)

const (
	// openTimeout bounds what happens between dialling and the first delivery.
	openTimeout = 30 * time.Second
	// longest is the longest wait between two connections, and how long one must
	// have lasted for the next wait to be short again.
	longest = 3 * time.Second
)

// delivery is one delivery of a message. live ends with the connection it came
// on: after that, or when the consumer is to stop, it is not begun and nothing
// is tried again, since RabbitMQ delivers it anew.
type delivery struct {
	amqp.Delivery
	live context.Context
	acks *acks
}

// receive has one connection after the other until ctx ends.
func (c *Consumer) receive(ctx context.Context, finish func()) error {
	wait := &backoff.ExponentialBackOff{
		InitialInterval: 100 * time.Millisecond, RandomizationFactor: 0.25, Multiplier: 2, MaxInterval: longest * 4 / 5,
	}
	for ctx.Err() == nil {
		begun := time.Now()
		err := c.connection(ctx, finish)
		if ctx.Err() != nil {
			break
		}
		if errors.Is(err, ErrSchema) {
			return fmt.Errorf("inbox: %w", err)
		}
		c.report(&c.receiving, err)
		if time.Since(begun) > longest {
			wait.Reset()
		}
		sleep(ctx, wait.NextBackOff())
	}
	return nil
}

// connection is one connection from its dial to its end, and returns why it
// ended. Whatever ends throws all away: nothing is mended in place.
func (c *Consumer) connection(ctx context.Context, finish func()) *waiting {
	if err := c.checkSchema(ctx); err != nil {
		return &waiting{"the database schema", err}
	}
	conn, err := c.dialer.Dial(ctx)
	if err != nil {
		return &waiting{"RabbitMQ", err}
	}
	defer hangUp(conn)
	s, problem := c.open(ctx, conn)
	if problem != nil {
		return problem
	}
	acks, stop := newAcks(s.Channel, c.cfg.Prefetch), make(chan struct{})
	var acking sync.WaitGroup
	acking.Go(func() { acks.run(stop) })
	defer acking.Wait()
	defer close(stop)
	live, end := context.WithCancel(ctx)
	defer c.discard()
	defer end()
	c.report(&c.receiving, nil)
	c.count(func(s *Stats) {
		if c.reconnects {
			s.Reconnects++
		}
		c.reconnects = true
	})
	for {
		select {
		case d, ok := <-s.deliveries:
			if !ok {
				return &waiting{"RabbitMQ", s.whyClosed()}
			}
			c.handOver(ctx, &delivery{d, live, acks})
		case <-ctx.Done():
			c.drain(s, finish)
			return nil
		}
	}
}

func (c *Consumer) checkSchema(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if err := dbschema.CheckVersion(ctx, c.db, c.cfg.Schema); err != nil {
		return err
	}
	return dbschema.CheckSession(ctx, c.db)
}

// stream is an open channel with a consumer on it.
type stream struct {
	*amqp.Channel
	deliveries <-chan amqp.Delivery
	closed     chan *amqp.Error
	cancelled  chan string
}

// open makes the topology and begins to consume. A peer that does not answer is
// cut off after openTimeout.
func (c *Consumer) open(ctx context.Context, conn *rabbit.Conn) (*stream, *waiting) {
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	defer context.AfterFunc(ctx, conn.Cut)()
	if err := c.setup(conn); err != nil {
		return nil, &waiting{"Setup", err}
	}
	ch, err := conn.Channel()
	if err != nil {
		return nil, &waiting{"RabbitMQ", err}
	}
	s := &stream{
		Channel:   ch,
		closed:    ch.NotifyClose(make(chan *amqp.Error, 1)),
		cancelled: ch.NotifyCancel(make(chan string, 1)),
	}
	if err := ch.Qos(c.cfg.Prefetch, 0, false); err != nil {
		return nil, &waiting{"RabbitMQ", err}
	}
	s.deliveries, err = ch.Consume(c.queue, c.cfg.Name, false, false, false, false, nil)
	if amqpErr := (*amqp.Error)(nil); errors.As(err, &amqpErr) && amqpErr.Code == amqp.NotFound {
		return nil, &waiting{"the queue", err}
	}
	if err != nil {
		return nil, &waiting{"RabbitMQ", err}
	}
	return s, nil
}

// setup has a channel of its own, which an error of the user's may close.
func (c *Consumer) setup(conn *rabbit.Conn) error {
	if c.cfg.Setup == nil {
		return nil
	}
	ch, err := conn.Channel()
	if err != nil {
		return err
	}
	if err := c.cfg.Setup(ch); err != nil {
		return err
	}
	return ch.Close()
}

// whyClosed is asked after the deliveries have ended; the reason was sent before.
func (s *stream) whyClosed() error {
	select {
	case <-s.cancelled:
		return errors.New("the broker cancelled the consumer: was the queue deleted?")
	case err := <-s.closed:
		if err != nil {
			return err
		}
	default:
	}
	return amqp.ErrClosed
}

// handOver gives a delivery to a worker: the same one for all messages of a key.
// It does not wait, as RabbitMQ sends no more ahead than a queue has room for.
func (c *Consumer) handOver(ctx context.Context, d *delivery) {
	queue := c.queues[c.cfg.Workers]
	if key := headerText(d.Headers[wire.KeyHeader]); key != "" {
		queue = c.queues[maphash.String(keySeed, key)%uint64(c.cfg.Workers)]
	}
	select {
	case queue <- d:
	case <-ctx.Done():
	}
}

var keySeed = maphash.MakeSeed()

// discard drops the deliveries that no worker has begun.
func (c *Consumer) discard() {
	for _, queue := range c.queues {
		for len(queue) > 0 {
			select {
			case <-queue:
			default: // a worker was faster
			}
		}
	}
}

// drain runs finish while what is in hand can still be acknowledged, and drops what
// is delivered meanwhile. It does not cancel the consumer: a queue with a single
// active one would go on to the next, ahead of what has yet to come back from here.
// All comes back when the connection closes.
func (c *Consumer) drain(s *stream, finish func()) {
	finished := make(chan struct{})
	go func() { defer close(finished); finish() }()
	deliveries := s.deliveries
	for {
		select {
		case _, ok := <-deliveries:
			if !ok {
				deliveries = nil // the connection is lost
			}
		case <-finished:
			return
		}
	}
}

// hangUp closes a connection; a peer that does not answer is cut off.
func hangUp(conn *rabbit.Conn) {
	defer time.AfterFunc(rollbackTimeout, conn.Cut).Stop()
	_ = conn.Close() // may have ended before
}
