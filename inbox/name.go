package inbox

import (
	"fmt"
	"sync"
)

// names are those under which this process consumes, and the queues: a name that two
// queues share would take one's messages for the other's.
var names = struct {
	sync.Mutex
	queues map[string]*nameUse
}{queues: make(map[string]*nameUse)}

type nameUse struct {
	queue     string
	consumers int
}

// useName returns an error if the consumer's name is in use for another queue, and
// otherwise the function that ends its use.
func (c *Consumer) useName() (end func(), err error) {
	names.Lock()
	defer names.Unlock()
	at := c.db.Config().ConnConfig
	id := fmt.Sprintf("%q", []string{at.Host, fmt.Sprint(at.Port), at.Database, c.cfg.Schema, c.cfg.Name})
	use := names.queues[id]
	if use == nil {
		use = &nameUse{queue: c.queue}
		names.queues[id] = use
	}
	if use.queue != c.queue {
		return nil, fmt.Errorf("inbox: Name: %q is in use for queue %q in this process; a message of one would count as a duplicate of the other's",
			c.cfg.Name, use.queue)
	}
	use.consumers++
	return func() {
		names.Lock()
		defer names.Unlock()
		if use.consumers--; use.consumers == 0 {
			delete(names.queues, id)
		}
	}, nil
}
